"""The state of running Nodes for people and for Prometheus; changes nothing."""
