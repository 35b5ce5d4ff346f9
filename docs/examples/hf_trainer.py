"""A student trained from a cache by Hugging Face's Trainer.

python hf_trainer.py CACHE STUDENT OUT
"""

import sys

from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from capgap import DistillationLoss, open_cache


class DistillationTrainer(Trainer):
    """Batches come from the cache, and the loss from capgap; all else is the Trainer's."""

    def __init__(self, cache, **arguments):
        super().__init__(**arguments)
        self.cache, self.loss = cache, DistillationLoss(self.model, cache, alpha=0.9)

    def get_train_dataloader(self):
        """The cache's own order, all epochs in one pass over the loader; `train_dataset` is not looked at."""
        args = self.args
        return Batches(self.cache.batches(args.train_batch_size, seed=args.seed, num_epochs=3))

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """Without the model's own forward pass, which would hold all logits."""
        return self.loss(inputs["batch"]).loss


class Batches:
    """The loader's batches as the dictionaries that the Trainer hands on."""

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
