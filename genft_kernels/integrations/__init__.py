"""For other libraries; each module imports the one that it is for."""
