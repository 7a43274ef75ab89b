"""Is it as good as the large image, and what does it cost?"""
