"""What clients.py trains: apart from it, since it imports all of Hugging Face's libraries."""

STEPS = 8
#: stage -> dtype, and whether the JSON names the scheduler or Hugging Face makes it
CASES = {1: ("no", True), 2: ("fp16", False), 3: ("bf16", True)}
