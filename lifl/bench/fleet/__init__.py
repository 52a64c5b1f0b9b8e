"""SuperNodes without processes: a load generator over the real Fleet API."""
