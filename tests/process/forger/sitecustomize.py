"""Read by every program of the hostile deployment: SuperNodes 3 to 7 push more than they were asked for.

After each reply they push, over their own authenticated connection, replies that Flower's own client code would never
send. Each answer is a line of JSON in the file $LIFL_FORGED.
"""

import json
import os
import sys

HOSTILE = [f"partition-id={me}" for me in range(3, 8)]


def forge() -> None:
    """Puts itself before Flower's pull: what was pushed until then is complete, objects and all."""
    import httpx
    from flwr.supernode.fleet_http_client import FleetHttpClient

    push, pull = FleetHttpClient.PushMessages, FleetHttpClient.PullMessages
    fresh: list = []
    old: list[str] = []

    def remember(client, request):
        fresh.append(request)
        return push(client, request)

    def forged(request, **change):
        other = type(request)()
        other.CopyFrom(request)
        metadata = other.messages_list[0].metadata
        for name, value in change.items():
            setattr(metadata, name, value)
        other.message_object_trees[0].object_id = metadata.message_id
        return other

    def push_more(client, request):
        metadata = request.messages_list[0].metadata
        attempts = {
            "sent again": forged(request),
            "a second reply": forged(request, message_id="d" * 64),
            "of another run": forged(request, message_id="e" * 64, run_id=metadata.run_id + 1),
            "to no message": forged(request, message_id="f" * 64, reply_to_message_id="0" * 64),
            "of another node": forged(request, message_id="a" * 64, src_node_id=metadata.src_node_id + 1),
        }
        if old:
            attempts["of an old round"] = forged(request, message_id="b" * 64, reply_to_message_id=old[-1])
        old.append(metadata.reply_to_message_id)
        with open(os.environ["LIFL_FORGED"], "a") as file:
            for what, attempt in attempts.items():
                try:
                    said = list(push(client, attempt).objects_to_push)
                except httpx.HTTPStatusError as error:
                    said = error.response.status_code
                file.write(json.dumps([what, said]) + "\n")

    def pull_after(client, request):
        while fresh:
            push_more(client, fresh.pop())
        return pull(client, request)

    FleetHttpClient.PushMessages, FleetHttpClient.PullMessages = remember, pull_after


# A SuperNode alone is concerned; the programs that it starts may be forked.
paths = [path for path in os.environ["PYTHONPATH"].split(os.pathsep) if path != os.path.dirname(__file__)]
os.environ["PYTHONPATH"] = os.pathsep.join(paths)
if "LIFL_FORGED" in os.environ and any(part in argument for argument in sys.argv for part in HOSTILE):
    forge()
