"""`python -m lorakit` is `lorakit`, for where the command is not on the path."""

from lorakit.cli import main

if __name__ == "__main__":
    main()
