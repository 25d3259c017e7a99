"""Define the profile views for Feast, generated from their one declaration in features.profiles.

`python -m features.profiles materialize` registers them. So does Feast's own command, for a look
around with its tools: `PYTHONPATH=. feast -c features/feast_repo apply`, from the project's root.
The latter looks for the parquet files in $FEAST_PROFILES, by default in data/profiles beside this
file.
"""

import os
from datetime import timedelta
from pathlib import Path

from feast import Entity, FeatureView, Field, FileSource, ValueType
from feast.data_format import ParquetFormat
from feast.types import Float64, Int64

from features.profiles import AS_OF, CUSTOMER_PROFILE, PROFILES, TERMINAL_PROFILE, ProfileView


def entity(view: ProfileView) -> Entity:
    """Define the entity a view is keyed by."""
    return Entity(name=view.key, join_keys=[view.key], value_type=ValueType.STRING)


def feature_view(view: ProfileView, profiles: Path) -> FeatureView:
    """Define a view over the parquet files below `profiles`.

    The path is made absolute: Feast 0.67 resolves a relative one against the working directory.
    """
    source = FileSource(
        name=f"{view.name}_days",
        path=str(profiles.resolve() / view.name),
        file_format=ParquetFormat(),
        timestamp_field="event_timestamp",
        created_timestamp_column="created",
    )
    return FeatureView(
        name=view.name,
        entities=[entity(view)],
        ttl=timedelta(milliseconds=view.ttl_ms),
        schema=[Field(name=field, dtype=Float64) for field in view.fields]
        + [Field(name=AS_OF, dtype=Int64)],
        source=source,
    )


def definitions(profiles: Path) -> list[Entity | FeatureView]:
    """Define everything Feast has to know."""
    return [*map(entity, PROFILES), *(feature_view(view, profiles) for view in PROFILES)]


_PROFILES_DIR = Path(os.environ.get("FEAST_PROFILES", Path(__file__).parent / "data" / "profiles"))

# `feast apply` registers what it finds under module-level names.
card_id = entity(CUSTOMER_PROFILE)
terminal_id = entity(TERMINAL_PROFILE)
customer_profile = feature_view(CUSTOMER_PROFILE, _PROFILES_DIR)
terminal_profile = feature_view(TERMINAL_PROFILE, _PROFILES_DIR)
