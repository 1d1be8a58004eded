"""JSON schemas of the custom resources in k8s/, which kubernetes-validate does not know.

They are the fields that the manifests use, with the types and values that the operators themselves allow
(Prometheus Operator's monitoring.coreos.com/v1, KEDA's keda.sh/v1alpha1, KubeRay's ray.io/v1, Kubeflow
Trainer's trainer.kubeflow.org/v1alpha1 with JobSet's policies), and allow no other field. Templates of pods
within them are for kubernetes-validate.
"""

from __future__ import annotations

from typing import Any

__all__ = ["SCHEMAS"]


def _object(required: dict[str, Any], optional: dict[str, Any] | None = None) -> dict[str, Any]:
    properties = required | (optional or {})
    return {
        "type": "object",
        "properties": properties,
        "required": list(required),
        "additionalProperties": False,
    }


def _list(items: dict[str, Any]) -> dict[str, Any]:
    return {"type": "array", "items": items, "minItems": 1}


def _resource(api_version: str, kind: str, spec: dict[str, Any]) -> dict[str, Any]:
    metadata = _object({"name": _TEXT, "namespace": _TEXT}, {"labels": _TEXTS})
    return _object(
        {"apiVersion": {"const": api_version}, "kind": {"const": kind}, "metadata": metadata, "spec": spec}
    )


_TEXT = {"type": "string", "minLength": 1}
_TEXTS = {"type": "object", "additionalProperties": {"type": "string"}}
_COUNT = {"type": "integer", "minimum": 0}
_DURATION = {"type": "string", "pattern": r"^([0-9]+(ms|[smhdwy]))+$"}
_RECORD = _object({"record": _TEXT, "expr": _TEXT}, {"labels": _TEXTS})
_ALERT = _object({"alert": _TEXT, "expr": _TEXT}, {"for": _DURATION, "labels": _TEXTS, "annotations": _TEXTS})
_SCALING = _object(
    {
        "policies": _list(
            _object(
                {
                    "type": {"enum": ["Pods", "Percent"]},
                    "value": {"type": "integer", "minimum": 1},
                    "periodSeconds": {"type": "integer", "minimum": 1, "maximum": 1800},
                }
            )
        )
    },
    {
        "selectPolicy": {"enum": ["Max", "Min", "Disabled"]},
        "stabilizationWindowSeconds": _COUNT | {"maximum": 3600},
    },
)
_TRIGGER = _object(
    {
        "type": {"const": "prometheus"},
        # KEDA reads each as text: a number or a truth value in YAML is refused.
        "metadata": _object(
            {"serverAddress": _TEXT, "query": _TEXT, "threshold": _TEXT},
            {"activationThreshold": _TEXT, "ignoreNullValues": {"enum": ["true", "false"]}},
        ),
    },
    {"metricType": {"enum": ["AverageValue", "Value"]}, "name": _TEXT},
)
_FALLBACK = _object(
    {"failureThreshold": _COUNT, "replicas": _COUNT},
    {
        "behavior": {
            "enum": ["static", "currentReplicas", "currentReplicasIfHigher", "currentReplicasIfLower"]
        }
    },
)

_POD_TEMPLATE = _object({"metadata": {"type": "object"}, "spec": {"type": "object"}})
_RAY_GROUP = {"rayStartParams": _TEXTS, "template": _POD_TEMPLATE}

_REPLICATED_JOB = _object(
    {
        "name": _TEXT,
        "template": _object({"metadata": _object({"labels": _TEXTS}), "spec": {"type": "object"}}),
    },
    {"replicas": _COUNT},
)
_FAILURE_RULE = _object(
    {
        "name": _TEXT,
        "action": {"enum": ["FailJobSet", "RestartJobSet", "RestartJobSetAndIgnoreMaxRestarts"]},
    },
    {
        "onJobFailureReasons": _list(
            {
                "enum": [
                    *("BackoffLimitExceeded", "DeadlineExceeded", "FailedIndexes"),
                    *("MaxFailedIndexesExceeded", "PodFailurePolicy"),
                ]
            }
        ),
        "targetReplicatedJobs": _list(_TEXT),
    },
)
_FAILURE_POLICY = _object({"maxRestarts": _COUNT}, {"rules": _list(_FAILURE_RULE)})
_PROCESSES = {"oneOf": [_COUNT | {"minimum": 1}, {"enum": ["auto", "cpu", "gpu"]}]}

SCHEMAS = {
    "TrainingRuntime": _resource(
        "trainer.kubeflow.org/v1alpha1",
        "TrainingRuntime",
        _object(
            {
                "mlPolicy": _object({"numNodes": _COUNT, "torch": _object({"numProcPerNode": _PROCESSES})}),
                "template": _object(
                    {
                        "spec": _object(
                            {"replicatedJobs": _list(_REPLICATED_JOB)},
                            {
                                "failurePolicy": _object(
                                    {"maxRestarts": _COUNT}, {"rules": _list(_FAILURE_RULE)}
                                )
                            },
                        )
                    }
                ),
            }
        ),
    ),
    "TrainJob": _resource(
        "trainer.kubeflow.org/v1alpha1",
        "TrainJob",
        _object(
            {
                "runtimeRef": _object(
                    {"name": _TEXT},
                    {
                        "apiGroup": {"const": "trainer.kubeflow.org"},
                        "kind": {"enum": ["TrainingRuntime", "ClusterTrainingRuntime"]},
                    },
                ),
                "trainer": _object(
                    {},
                    {
                        "image": _TEXT,
                        "command": _list(_TEXT),
                        "args": _list(_TEXT),
                        "numNodes": _COUNT,
                        "numProcPerNode": _PROCESSES,
                        "resourcesPerNode": _object(dict.fromkeys(("requests", "limits"), _TEXTS)),
                    },
                ),
            }
        ),
    ),
    "RayService": _resource(
        "ray.io/v1",
        "RayService",
        _object(
            {
                "serveConfigV2": _TEXT,
                "rayClusterConfig": _object(
                    {
                        "rayVersion": {"type": "string", "pattern": r"^\d+\.\d+\.\d+$"},
                        "headGroupSpec": _object(_RAY_GROUP),
                        "workerGroupSpecs": _list(
                            _object(
                                _RAY_GROUP
                                | {"groupName": _TEXT}
                                | dict.fromkeys(("replicas", "minReplicas", "maxReplicas"), _COUNT)
                            )
                        ),
                    },
                    {
                        "enableInTreeAutoscaling": {"type": "boolean"},
                        "autoscalerOptions": _object(
                            {},
                            {
                                "version": {"enum": ["v1", "v2"]},
                                "idleTimeoutSeconds": _COUNT,
                                "resources": {"type": "object"},
                                "securityContext": {"type": "object"},
                            },
                        ),
                    },
                ),
            },
            {"excludeHeadPodFromServeSvc": {"type": "boolean"}},
        ),
    ),
    "PodMonitor": _resource(
        "monitoring.coreos.com/v1",
        "PodMonitor",
        _object(
            {
                "selector": _object({"matchLabels": _TEXTS}),
                "podMetricsEndpoints": _list(
                    _object(
                        {"port": _TEXT},
                        {"path": _TEXT, "interval": _DURATION, "scrapeTimeout": _DURATION},
                    )
                ),
            },
            {"jobLabel": _TEXT},
        ),
    ),
    "PrometheusRule": _resource(
        "monitoring.coreos.com/v1",
        "PrometheusRule",
        _object(
            {"groups": _list(_object({"name": _TEXT, "rules": _list({"oneOf": [_RECORD, _ALERT]})}))},
        ),
    ),
    "ScaledObject": _resource(
        "keda.sh/v1alpha1",
        "ScaledObject",
        _object(
            {
                "scaleTargetRef": _object({"name": _TEXT}, {"apiVersion": _TEXT, "kind": _TEXT}),
                "triggers": _list(_TRIGGER),
            },
            {
                "minReplicaCount": _COUNT,
                "maxReplicaCount": _COUNT,
                "pollingInterval": _COUNT,
                "cooldownPeriod": _COUNT,
                "fallback": _FALLBACK,
                "advanced": _object(
                    {
                        "horizontalPodAutoscalerConfig": _object(
                            {"behavior": _object({"scaleUp": _SCALING, "scaleDown": _SCALING})}
                        )
                    }
                ),
            },
        ),
    ),
}
