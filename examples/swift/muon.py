"""Muon for ms-swift, whose trainers accept no "optimizer" in the DeepSpeed JSON:

    NPROC_PER_NODE=8 swift sft --external_plugins examples/swift/muon.py --optimizer muon_plugin --deepspeed zero2 ...

Learning rate and weight decay are swift's own; other settings come from its optim_args: --optim_args momentum=0.9.
"""

from __future__ import annotations

from typing import Any

from swift.optimizers import OptimizerCallback, optimizers_map

import muon_plugin


class MuonCallback(OptimizerCallback):
    def create_optimizer(self, model: Any = None) -> muon_plugin.Muon:
        if model is None:
            model = self.trainer.model
        given = dict(pair.split("=") for pair in (self.args.optim_args or "").replace(" ", "").split(",") if pair)
        settings = {"lr": self.args.learning_rate, "weight_decay": self.args.weight_decay}
        settings |= {key: float(value) for key, value in given.items()}
        return muon_plugin.Muon(model.named_parameters(), model=model, **settings)


optimizers_map["muon_plugin"] = MuonCallback
muon_plugin.register()
