"""`python -m dlm_tune ...` is `dlm-tune ...`; also what `accelerate launch -m dlm_tune` runs."""

import sys

from dlm_tune.cli import main

if __name__ == "__main__":
    sys.exit(main())
