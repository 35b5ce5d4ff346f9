"""Train a student from a cache with Hugging Face's Trainer.

python hf_trainer.py CACHE STUDENT OUT
"""

import sys

from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from capgap import DistillationLoss, open_cache


class DistillationTrainer(Trainer):
    """A Trainer that takes its batches from the cache and its loss from capgap."""

    def __init__(self, cache, **arguments):
        super().__init__(**arguments)
        self.cache, self.loss = cache, DistillationLoss(self.model, cache, alpha=0.9)

    def get_train_dataloader(self):
        """Return all epochs in the cache's own order as one pass over the loader; `train_dataset` is ignored."""
        args = self.args
        return Batches(self.cache.batches(args.train_batch_size, seed=args.seed, num_epochs=3))

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """Compute the loss without the model's own forward pass, which would hold all logits in memory."""
        return self.loss(inputs["batch"]).loss


class Batches:
    """The loader's batches as the dictionaries that the Trainer expects."""

    def __init__(self, loader):
        self.loader, self.dataset, self.batch_size = loader, range(len(loader)), 1

    def __len__(self):
        return len(self.loader)

    def __iter__(self):
        return ({"batch": batch} for batch in self.loader)


if len(sys.argv) != 4:
    sys.exit(__doc__)
student = AutoModelForCausalLM.from_pretrained(sys.argv[2])
arguments = TrainingArguments(
    sys.argv[3], per_device_train_batch_size=8, num_train_epochs=1, learning_rate=1e-3, logging_steps=5, report_to=[]
)
trainer = DistillationTrainer(open_cache(sys.argv[1]), model=student, args=arguments)
print(trainer.train())
trainer.save_model(sys.argv[3])
