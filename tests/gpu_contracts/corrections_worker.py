"""A run that resumes with Megatron's distributed optimizer and torch's AdamW.

Given the word `uncorrected`, it lacks the correction of Megatron that such a run needs; see `test_corrections`.
"""

import sys
import tempfile
from pathlib import Path

from trainer_cases import initialise, make_config, make_policy, make_rows, make_trainer, save

from spell_megatron.checkpoint.restore import restore
from spell_megatron.training import corrections


def main() -> None:
    if "uncorrected" in sys.argv:
        corrections._load_steps = lambda: None
    with tempfile.TemporaryDirectory() as folder:
        make_policy("qwen3", Path(folder, "policy"))
        config = make_config(Path(folder, "policy"), training__optimizer__distributed=True)
        initialise(config)
        trainer = make_trainer(config)
        trainer.update(make_rows())
        save(Path(folder, "run"), 1, trainer, config, {"step": 1})
        step, *_ = restore(Path(folder, "run"), make_trainer(config))
    print(f"RESULT resumed after step {step}")


if __name__ == "__main__":  # saving starts processes that import this file
    main()
