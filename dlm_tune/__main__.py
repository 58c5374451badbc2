"""`python -m dlm_tune ...` is `dlm-tune ...`; also what `accelerate launch -m dlm_tune` runs."""

from dlm_tune.cli import main
from dlm_tune.commands.launch import leave

if __name__ == "__main__":
    leave(main())
