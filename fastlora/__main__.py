"""`python -m fastlora` is the command line."""

from fastlora.cli import main

if __name__ == "__main__":
    main()
