"""Rank tables of each form, as their JSON says them."""


def device(number, ip="", rank=None):
    return {"device_id": str(number), "device_ip": ip or f"10.0.0.{number}"} | (
        {} if rank is None else {"rank_id": str(rank)})


def version_1_0(*servers, **more):
    """A table as a dict; a server is (server_id, devices)."""
    return {"status": "completed", "version": "1.0", "server_count": str(len(servers)),
            "server_list": [{"server_id": name, "device": devices} for name, devices in servers]} | more


def groups(*instances, **more):
    """A group-form table of one group; an instance is (pod_name, server_id, devices)."""
    entries = [{"pod_name": pod, "server_id": server, "devices": devices} for pod, server, devices in instances]
    return {"status": "completed", "group_count": "1", "group_list": [{"group_name": "job", "instance_list": entries}]}


def lab(*rows, **more):
    """A table of the lab form; a row is (rank, server)."""
    instances = [{"devices": [device(rank)], "rank_id": str(rank), "server_id": server} for rank, server in rows]
    group = {"device_num": str(len(rows)), "server_num": "1", "instance_count": str(len(rows)),
             "instance_list": instances}
    return {"status": "completed", "deploy_mode": "lab", "group_list": [group | more]}


def super_pods(**more):
    """One server in one super pod, as version "1.2"."""
    table = version_1_0(("a", [device(0, rank=0) | {"super_device_id": "7"}]), version="1.2")
    return table | {"super_pod_list": [{"super_pod_id": "0", "server_list": [{"server_id": "a"}]}]} | more


def ranks(*rows, **more):
    """A table of version "2.0", values numbers as in CANN's documentation; a row is (device_id, server, address)."""
    return {"version": "2.0", "rank_count": len(rows), "rank_list": [
        {"rank_id": rank, "local_id": number, "device_id": number, "level_list": [
            {"net_layer": 0, "net_instance_id": server, "net_type": "TOPO_FILE_DESC",
             "rank_addr_list": [{"addr_type": "EID" if len(address) == 32 else "IPV4", "addr": address}]}]}
        for rank, (number, server, address) in enumerate(rows)]} | more
