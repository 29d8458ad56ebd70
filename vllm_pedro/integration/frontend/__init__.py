"""In the process that talks to users: requests, model names, flags, metrics."""
