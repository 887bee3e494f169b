"""`rlhf-ray doctor`: whether a cluster would carry a run, node by node, before the run starts."""
