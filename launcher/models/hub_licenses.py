"""Licenses of models on the Hub, and which models only accounts that accepted the license can download.

The license is the model card's field `license`, or `license_name` if that is `other`:
https://huggingface.co/docs/hub/model-cards#model-card-metadata. Not legal advice: the text on the model's page is authoritative.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class HubLicense:
    """The name of a license; `is_gated` is whether the Hub requires accepting it before a download."""

    name: str
    is_gated: bool = False


_APACHE = HubLicense("apache-2.0")
# By prefix of the repository name; the longest matching prefix wins.
LICENSES: Mapping[str, HubLicense] = {
    "HuggingFaceTB/SmolLM2-": _APACHE,
    "HuggingFaceTB/SmolLM3-": _APACHE,
    "Qwen/Qwen2.5-": _APACHE,
    "Qwen/Qwen2.5-3B": HubLicense("qwen-research"),
    "Qwen/Qwen2.5-72B": HubLicense("qwen"),
    "Qwen/Qwen3-": _APACHE,
    "allenai/OLMo-2-": _APACHE,
    "allenai/OLMoE-": _APACHE,
    "google/gemma-": HubLicense("gemma", is_gated=True),
    "meta-llama/": HubLicense("llama", is_gated=True),
    "meta-llama/Llama-3.1-": HubLicense("llama3.1", is_gated=True),
    "meta-llama/Llama-3.2-": HubLicense("llama3.2", is_gated=True),
    "meta-llama/Llama-3.3-": HubLicense("llama3.3", is_gated=True),
    "microsoft/phi-4": HubLicense("mit"),
    "mistralai/Mistral-7B-": _APACHE,
    "mistralai/Mistral-Nemo-": _APACHE,
    "mistralai/Mistral-Small-24B-": _APACHE,
}


def find_license(repo_id: str) -> HubLicense | None:
    """Return the license of a repository; None if it is not in the table."""
    prefixes = [prefix for prefix in LICENSES if repo_id.startswith(prefix)]
    return LICENSES[max(prefixes, key=len)] if prefixes else None
