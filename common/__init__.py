"""Small helpers that the scripts share; nothing in here could change a result."""
