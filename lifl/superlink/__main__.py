"""``python -m lifl.superlink`` is ``lifl-superlink``."""

from lifl.superlink.command import main

if __name__ == "__main__":
    main()
