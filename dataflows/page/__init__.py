"""The operator page: what the flow does now, and what it flagged last, in a browser."""
