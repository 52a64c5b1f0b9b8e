"""Six honest SuperNodes and two that send nonsense."""
