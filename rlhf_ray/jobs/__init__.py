"""Runs as jobs of a Ray cluster: what is uploaded, and the calls to the cluster."""
