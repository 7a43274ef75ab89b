"""The viewer: one HTML page that shows the similarity of every cell to a point, without a server or a network."""
