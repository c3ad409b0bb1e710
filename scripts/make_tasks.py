"""Write the built-in tasks as files that lm-evaluation-harness runs by itself.

usage: python scripts/make_tasks.py DIR
       lm-eval run --model hf --model_args pretrained=MODEL --include_path DIR --tasks hfq-cloze-docs

The same items as `hf-quant evaluate --tasks builtin`, which makes them in memory.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from hf_quant.evaluation import task_set


def main() -> None:
    """Write them and say how many items there are."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path, help="for one YAML file and two files of items per task")
    for file in task_set.write(parser.parse_args().directory):
        print(f"{file.stem}: {len(task_set.items(file.stem)) - task_set.SHOTS} items")


if __name__ == "__main__":
    main()
