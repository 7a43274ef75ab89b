"""Is it as good as the large picture, and what does it cost?"""
