"""A load generator: virtual SuperNodes, without processes of their own, over the real Fleet API."""
