"""Muon for ms-swift, whose trainers accept no "optimizer" in the DeepSpeed JSON:

    NPROC_PER_NODE=8 swift sft --external_plugins examples/swift/muon.py --optimizer muon_plugin --deepspeed zero2 ...

Learning rate and weight decay are swift's own. Other settings come from its optim_args, each value as in JSON, without
commas, a string also without quotes: --optim_args momentum=0.9,ns_steps=6,ns_method=standard.
"""

from __future__ import annotations

import json
from typing import Any

from swift.optimizers import OptimizerCallback, optimizers_map

import muon_plugin


class MuonCallback(OptimizerCallback):
    def create_optimizer(self, model: Any = None) -> muon_plugin.Muon:
        if model is None:
            model = self.trainer.model
        given = dict(pair.split("=") for pair in (self.args.optim_args or "").replace(" ", "").split(",") if pair)
        settings = {"lr": self.args.learning_rate, "weight_decay": self.args.weight_decay}
        settings |= {key: _value(text) for key, text in given.items()}
        return muon_plugin.Muon(model.named_parameters(), model=model, **settings)


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text


optimizers_map["muon_plugin"] = MuonCallback
muon_plugin.register()
