"""Objects on the server by their ids, in the arena or in a database."""
