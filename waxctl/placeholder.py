"""Waxctl wants a file to deploy. The flow is in the image: see entrypoint.sh."""
