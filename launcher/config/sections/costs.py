"""The section for the cost of the same work at hosted services."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, field_validator

from launcher.config.sections.fields import Name, Section

UsdPerMillion = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class HostedPrice(Section):
    """Prices of a hosted service, in US dollars per million tokens."""

    name: Name = Field(description="Name of the service and its model, such as acme-8b.")
    training: UsdPerMillion | None = Field(None, description="Price per million training tokens; each epoch counts.")
    input: UsdPerMillion | None = Field(None, description="Price per million prompt tokens of the fine-tuned model.")
    output: UsdPerMillion | None = Field(None, description="Price per million answer tokens of the fine-tuned model.")


class CostsSection(Section):
    """What training and requests would cost at hosted services, at your prices; shown by `plan`, `report` and `evaluate`."""

    hosted: tuple[HostedPrice, ...] = Field(
        (),
        description=(
            "Prices of hosted services: 'costs.hosted=[{name: acme-8b, training: 3.0, input: 0.3, output: 1.2}]'. The launcher "
            "ships none, because prices change."
        ),
    )

    @field_validator("hosted")
    @classmethod
    def _different_names(cls, value: tuple[HostedPrice, ...]) -> tuple[HostedPrice, ...]:
        names = [one.name for one in value]
        if len({*names}) < len(names):
            raise ValueError(f"uses a name twice ({', '.join(names)}); give every service its own name")
        return value
