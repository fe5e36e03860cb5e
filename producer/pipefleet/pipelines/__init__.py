"""`pipefleet.pipeline(...)`: the call of transformers, served by the fleet."""

from pipefleet.pipelines.fleet_pipeline import FleetPipeline, Results, pipeline

__all__ = ["FleetPipeline", "Results", "pipeline"]
