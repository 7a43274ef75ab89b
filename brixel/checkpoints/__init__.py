"""Files of weights and configurations: found, downloaded, read, converted, written, uploaded."""
