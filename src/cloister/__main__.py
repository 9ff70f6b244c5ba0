"""`python -m cloister` is the command `cloister`."""

from cloister.cli.main import main

if __name__ == "__main__":
    main()
