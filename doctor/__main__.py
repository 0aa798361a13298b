"""`python -m doctor`, which is also what torchrun starts."""

from doctor.cli.main import main

if __name__ == "__main__":
    main()
