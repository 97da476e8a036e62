"""The imports that ranks of any test need. Nothing is built here."""

import deepspeed  # noqa: F401
import torch._dynamo  # noqa: F401
import transformers.models.llama.modeling_llama  # noqa: F401

import launcher.evaluate.answers
import launcher.train.finish
import launcher.train.loop
import launcher.train.resume  # noqa: F401
from launcher.train.engine import import_muon
from launcher.worker.ranks.fork_server import find_fork_hazard

import_muon()
assert (refusal := find_fork_hazard()) is None, refusal
