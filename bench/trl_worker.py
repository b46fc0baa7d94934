"""TRL's side of `bench.against_trl`, run by the python of an environment that has TRL; imports
nothing of this project. The job comes as a JSON file, the result goes to stdout as one line.
"""

import json
import resource
import sys
import tempfile
import time

import torch
from torch.utils.data import SequentialSampler
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback, set_seed
from transformers.utils import logging
from trl.experimental.gkd import GKDConfig, GKDTrainer


def collate(rows: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
    """Prompts padded on the left and answers on the right, as GKDTrainer takes its logits apart."""
    width = max(len(row["prompt"]) for row in rows)
    longest = max(len(row["response"]) for row in rows)
    tokens, mask, labels = [], [], []
    for row in rows:
        before, after = width - len(row["prompt"]), longest - len(row["response"])
        tokens.append([0] * before + row["prompt"] + row["response"] + [0] * after)
        mask.append([0] * before + [1] * (len(tokens[-1]) - before - after) + [0] * after)
        labels.append([-100] * width + row["response"] + [-100] * after)
    return {
        "input_ids": torch.tensor(tokens),
        "attention_mask": torch.tensor(mask),
        "labels": torch.tensor(labels),
        "prompts": torch.tensor(tokens)[:, :width],
    }


class InOrder(GKDTrainer):
    def _get_train_sampler(self, *args: object, **kwargs: object) -> SequentialSampler:
        return SequentialSampler(self.train_dataset)


class Clock(TrainerCallback):
    def __init__(self) -> None:
        self.ends: list[float] = []

    def on_step_end(self, *args: object, **kwargs: object) -> None:
        self.ends.append(time.perf_counter())


def main() -> None:
    from datasets import Dataset

    with open(sys.argv[1], encoding="utf-8") as file:
        job = json.load(file)
    torch.set_num_threads(job["threads"])
    logging.set_verbosity_error()
    set_seed(0)
    clock, rows = Clock(), [row for batch in job["batches"] for row in batch]
    with tempfile.TemporaryDirectory() as folder:
        settings = GKDConfig(
            output_dir=folder,
            lmbda=0.0,  # the answers as given
            beta=0.0,  # the forward KL divergence
            per_device_train_batch_size=len(job["batches"][0]),
            max_steps=len(job["batches"]),
            learning_rate=job["learning_rate"],
            lr_scheduler_type="constant",
            adam_beta1=0.9,
            adam_beta2=0.95,
            weight_decay=0.0,
            max_grad_norm=1.0,
            gradient_checkpointing=False,
            bf16=False,
            logging_steps=1,
            report_to="none",
            save_strategy="no",
            disable_tqdm=True,
            use_cpu=True,
        )
        trainer = InOrder(
            model=AutoModelForCausalLM.from_pretrained(job["draft"], dtype=torch.float32),
            teacher_model=AutoModelForCausalLM.from_pretrained(job["target"], dtype=torch.float32),
            args=settings,
            data_collator=collate,
            train_dataset=Dataset.from_list(rows),
            processing_class=AutoTokenizer.from_pretrained(job["target"]),
            callbacks=[clock],
        )
        trainer.train()
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(json.dumps({"ends": clock.ends, "losses": losses, "peak_bytes": peak}))


if __name__ == "__main__":
    main()
