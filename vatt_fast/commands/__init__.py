"""What ``vatt-fast`` does, one function a verb; their docstrings are its help."""
