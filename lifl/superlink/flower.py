"""The undocumented names of Flower's that the server needs, by the part that needs them.

A part with a missing name is left out, which is logged once: Flower's own path does the work then. Other modules of
``lifl.superlink`` import from ``flwr.app`` only. Names that are replaced are in ``lifl.superlink.patches``.
"""

from __future__ import annotations

import importlib
from types import SimpleNamespace

NAMES: dict[str, dict[str, str]] = {
    "server": {  # without these names there is no server to change
        "parse_config": "flwr.superlink.cli.flower_superlink._parse_superlink_lifespan_config",
        "parser": "flwr.superlink.cli.flower_superlink._parse_args_run_superlink",
        "Lifespan": "flwr.superlink.cli.flower_superlink.SuperLinkLifespan",
        "main": "flwr.superlink.main",
        "create_app": "flwr.superlink.main.create_app",
        "get_log_config": "flwr.supercore.http_logging.get_uvicorn_log_config",
        "console_handler": "flwr.supercore.logger.console_handler",
        "log": "flwr.supercore.log",
        "logger": "flwr.supercore.logger.FLOWER_LOGGER",
        "version": "flwr.supercore.version.package_version",
        "warn_update": "flwr.supercore.update_check.warn_if_flwr_update_available",
    },
    "store": {
        "get_factories": "flwr.superlink.main.get_objectstore_linkstate_factories",
        "ObjectStore": "flwr.supercore.object_store.ObjectStore",
        "NoObjectInStoreError": "flwr.supercore.object_store.NoObjectInStoreError",
        "SqlObjectStore": "flwr.supercore.object_store.sql_object_store.SqlObjectStore",
        "StoredObject": "flwr.supercore.state.schema.objectstore_models.StoredObject",
        "ObjectChild": "flwr.supercore.state.schema.objectstore_models.ObjectChild",
        "RunObject": "flwr.supercore.state.schema.objectstore_models.RunObject",
        "signed": "flwr.supercore.utils.uint64_to_int64",
        "IN_MEMORY": "flwr.supercore.constant.FLWR_IN_MEMORY_DB_NAME",
        "ObjectTree": "flwr.proto.message_pb2.ObjectTree",
        "is_valid_id": "flwr.supercore.inflatable.inflatable_object.is_valid_sha256_hash",
        "iterate_tree": "flwr.supercore.inflatable.inflatable_object.iterate_object_tree",
        "validate_content": "flwr.supercore.inflatable.inflatable_utils.validate_object_content",
    },
    "gateway": {
        "HttpProtocol": "uvicorn.protocols.http.httptools_impl.HttpToolsProtocol",
        "STATUS_LINE": "uvicorn.protocols.http.httptools_impl.STATUS_LINE",
        "FlowControl": "uvicorn.protocols.http.flow_control.FlowControl",
        "authenticate_node": "flwr.superlink.routers.fleet.node_auth.authenticate_node",
        "node_auth": "flwr.superlink.routers.fleet.node_auth",
        "bytes_to_public_key": "flwr.superlink.routers.fleet.node_auth.bytes_to_public_key",
        "authenticate_task": "flwr.supercore.dependencies.task.authenticate_task",
        "TASK_TOKEN_HEADER": "flwr.supercore.constant.TASK_TOKEN_HEADER",
        "VersionDependency": "flwr.supercore.dependencies.version.VersionDependency",
        "translate_error": "flwr.supercore.error.http_error_translator",
        "FlowerError": "flwr.supercore.error.FlowerError",
        "ApiErrorCode": "flwr.supercore.error.ApiErrorCode",
        "fleet": "flwr.superlink.servicer.fleet.fleet_handlers",
        "runtime": "flwr.superlink.servicer.runtime.runtime_handlers",
        "check_abort": "flwr.superlink.servicer.fleet.fleet_handlers.check_abort",
        "Status": "flwr.common.constant.Status",
        "SUPERLINK_NODE_ID": "flwr.common.constant.SUPERLINK_NODE_ID",
        "MEDIA_TYPE": "flwr.supercore.protobuf.constants.PROTOBUF_MEDIA_TYPE",
        "PushObjectRequest": "flwr.proto.message_pb2.PushObjectRequest",
        "PushObjectResponse": "flwr.proto.message_pb2.PushObjectResponse",
        "PullObjectRequest": "flwr.proto.message_pb2.PullObjectRequest",
        "ConfirmMessageReceivedRequest": "flwr.proto.message_pb2.ConfirmMessageReceivedRequest",
        "PullMessagesRequest": "flwr.proto.fleet_pb2.PullMessagesRequest",
        "PushMessagesRequest": "flwr.proto.fleet_pb2.PushMessagesRequest",
        "PushMessagesResponse": "flwr.proto.fleet_pb2.PushMessagesResponse",
        "get_extension_middleware": "flwr.superlink.extensions.get_middleware",
    },
    "rounds": {
        "message_to_proto": "flwr.common.serde.message_to_proto",
        "ErrorCode": "flwr.common.constant.ErrorCode",
        "MAX_CHUNK_BYTES": "flwr.common.constant.FLWR_PRIVATE_MAX_ARRAY_CHUNK_SIZE",
        "head_of": "flwr.supercore.inflatable.inflatable_object.get_object_head_values_from_object_content",
        "body_of": "flwr.supercore.inflatable.inflatable_object.get_object_body",
        "classes": "flwr.supercore.inflatable.inflatable_utils.inflatable_class_registry",
    },
}
"""Part -> lifl's name for an object -> Flower's."""


class MissingNameError(ImportError):
    """Flower (or uvicorn) has moved or dropped a name that a part needs. The message has the name."""


def resolve(dotted: str) -> object:
    """The module of a dotted name, or the object in a module; raises :class:`MissingNameError`."""
    try:
        return importlib.import_module(dotted)
    except ImportError:
        module, _, name = dotted.rpartition(".")
        try:
            return getattr(importlib.import_module(module), name)
        except (ImportError, AttributeError) as error:
            raise MissingNameError(f"{dotted} is not there ({error})") from None


def part(name: str) -> SimpleNamespace:
    """The objects of one part, by lifl's names; raises :class:`MissingNameError` with the first that is gone."""
    return SimpleNamespace(**{ours: resolve(dotted) for ours, dotted in NAMES[name].items()})
