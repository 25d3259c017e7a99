"""The operators of the graph, one file each; every item between them is a micro-batch."""
