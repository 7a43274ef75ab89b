"""The commands of `brixel`: each module parses, calls and prints for a few of them."""
