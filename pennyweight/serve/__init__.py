"""The HTTP service and its page; needs no optimizer."""
