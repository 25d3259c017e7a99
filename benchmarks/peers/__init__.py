"""The same job done by this project's core and by its peers, on one broker, in one run."""
