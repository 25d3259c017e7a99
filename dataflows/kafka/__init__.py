"""Kafka in, Kafka out: the only package that talks to a broker."""
