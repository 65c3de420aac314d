"""What methods are given: the parts of a run's settings and of a finished run that they need."""

from __future__ import annotations

from typing import Protocol

from transformers import PreTrainedModel

from sorsa_ds.config.schema import AdapterConfig, BaselineConfig, MethodName, ResidualConfig, SorsaConfig
from sorsa_ds.model.adapter_file import FactorFile
from sorsa_ds.model.weight_sources import DiskWeightSource
from sorsa_ds.runtime.precision import Precision
from sorsa_ds.sorsa.residual_storage import Storage


class Settings(Protocol):
    """The part of a run's settings, or of an adapter's description, that a method needs."""

    @property
    def method(self) -> MethodName: ...
    @property
    def adapter(self) -> AdapterConfig: ...
    @property
    def sorsa(self) -> SorsaConfig: ...
    @property
    def baseline(self) -> BaselineConfig: ...
    @property
    def residual(self) -> ResidualConfig: ...


class TrainedRun(Protocol):
    """The part of a finished run that a method needs to tell what its layers compute (`sorsa_ds.run.source.Source`)."""

    @property
    def described(self) -> Settings: ...
    @property
    def precision(self) -> Precision: ...
    @property
    def storage(self) -> Storage: ...
    @property
    def model(self) -> PreTrainedModel: ...
    @property
    def weights(self) -> DiskWeightSource: ...
    @property
    def initial(self) -> FactorFile | None: ...
    @property
    def trained(self) -> FactorFile: ...
