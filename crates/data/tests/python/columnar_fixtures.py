"""usage: columnar_fixtures.py FOLDER   makes the files of tests/columnar with pyarrow and datasets.

`X.jsonl` is what `datasets.Dataset.to_json` makes of the rows in the other files called X.
"""
import datetime, decimal, os, sys
import pyarrow as pa, pyarrow.feather, pyarrow.parquet as pq
import datasets
from datasets import ClassLabel, Dataset, DatasetDict, Features, LargeList, List, Value

out = sys.argv[1]
os.makedirs(out, exist_ok=True)
at = lambda name: os.path.join(out, name)

# Conversations: fields that only some messages have are null in the others, tools are JSON.
conversations = [
    {"messages": [{"role": "user", "content": "Weather in Köln? ☔"},
                  {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "weather", "arguments": {"city": "Köln"}}}]},
                  {"role": "tool", "name": "weather", "content": "rain"},
                  {"role": "assistant", "content": "Rain."}],
     "tools": [{"function": {"name": "weather", "parameters": {"type": "object", "properties": {"city": {"type": "string"}}}}}]},
    {"messages": [{"role": "user", "content": ""}, {"role": "assistant", "content": "𝕳i\n\"there\"\\"}], "tools": []},
    {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}], "tools": None},
]
data = Dataset.from_list(conversations, on_mixed_types="use_json")
data.to_json(at("conversations.jsonl"))
data.to_parquet(at("conversations.parquet"))
DatasetDict({"train": data, "test": data.select([1])}).save_to_disk(at("conversations_saved"))

# The same as structs: each message has the fields of all.
structs = Dataset.from_list([{"messages": [{k: v for k, v in m.items() if k != "tool_calls"} for m in row["messages"]]} for row in conversations])
assert "Json" not in str(structs.features), structs.features
structs.to_json(at("structs.jsonl"))
structs.to_parquet(at("structs.parquet"), batch_size=1)

# Tokens, with the types of other people's tokenised sets.
tokens = Dataset.from_dict(
    {"input_ids": [[1, 2, 3], [4], []], "labels": [[-100, 2, 3], [4], []], "attention_mask": [[1, 1, 1], [1], []],
     "completion_mask": [[False, True, True], [True], []], "wide": [[7], [2**40], [-1]], "kind": [1, 0, 1]},
    features=Features({"input_ids": List(Value("int32")), "labels": List(Value("int64")), "attention_mask": List(Value("int8")),
                       "completion_mask": List(Value("bool")), "wide": LargeList(Value("int64")), "kind": ClassLabel(names=["a", "b"])}))
tokens.to_json(at("tokens.jsonl"))
pq.write_table(tokens.data.table, at("tokens.parquet"), compression="lz4")
tokens.save_to_disk(at("tokens_saved"), num_shards=2)

# Every type that has a JSON form.
day = datetime.datetime(2024, 1, 2, 3, 4, 5, 678901)
types = {
    "i8": pa.array([-1, None], pa.int8()), "u8": pa.array([255, 0], pa.uint8()), "i16": pa.array([-300, 1], pa.int16()),
    "u16": pa.array([65535, 1], pa.uint16()), "u32": pa.array([2**32 - 1, 1], pa.uint32()), "u64": pa.array([2**63 - 1, 1], pa.uint64()),
    "f64": pa.array([0.1, float("nan")]), "f32": pa.array([0.25, -3.5], pa.float32()),
    "bool": pa.array([True, None]), "null": pa.nulls(2),
    "large": pa.array(["ä", "b"], pa.large_string()), "dict": pa.array(["x", "y"]).dictionary_encode(),
    "us": pa.array([day, datetime.datetime(1969, 12, 31, 23, 59, 59, 999900)], pa.timestamp("us")),
    "tz": pa.array([day.replace(microsecond=0), None], pa.timestamp("s", tz="Europe/Berlin")),
    "ns": pa.array([day, None], pa.timestamp("ns")), "date": pa.array([day.date(), datetime.date(1950, 5, 6)]),
    "time": pa.array([day.time(), datetime.time(23, 0, 1)]), "dec": pa.array([decimal.Decimal("-1.50"), decimal.Decimal("12345.67")]),
    "dur": pa.array([datetime.timedelta(seconds=90), datetime.timedelta(microseconds=-1500)]),
    "nested": pa.array([[[1, 2], [], None], []], pa.list_(pa.list_(pa.int16()))),
    "struct": pa.array([{"a": 1, "b": None}, None], pa.struct([("a", pa.int64()), ("b", pa.string())])),
    "fixed": pa.array([[1, 2], [3, 4]], pa.list_(pa.int32(), 2)),
}
table = pa.table(types)
Dataset(table).to_json(at("types.jsonl"))
pq.write_table(table, at("types.parquet"), compression="zstd")
pq.write_table(table, at("types_gzip.parquet"), compression="gzip", data_page_version="2.0", row_group_size=1)
for codec in (None, "lz4", "zstd"):
    options = pa.ipc.IpcWriteOptions(compression=codec)
    with pa.OSFile(at(f"types_{codec or 'plain'}.arrow"), "wb") as f, pa.ipc.new_file(f, table.schema, options=options) as w:
        w.write_table(table, max_chunksize=1)
with pa.OSFile(at("types_stream.arrow"), "wb") as f, pa.ipc.new_stream(f, table.schema) as w:
    w.write_table(table)

# What has no JSON form, by the column's name.
with pa.OSFile(at("refused.arrow"), "wb") as f:
    bad = pa.table({"image": pa.array([b"\xff\xd8"]), "inf": pa.array([float("inf")]), "span": pa.array([(1, 2, 3)], pa.month_day_nano_interval())})
    with pa.ipc.new_stream(f, bad.schema) as w:
        w.write_table(bad)
with pa.OSFile(at("views.arrow"), "wb") as f:
    views = pa.table({"view": pa.array(["short", "longer than twelve bytes ☔"], pa.string_view()), "bytes": pa.array([b"x", b"y"]),
                      "map": pa.array([[("k", 1), ("l", None)], []], pa.map_(pa.string(), pa.int32())),
                      "half": pa.array([1.5, 0.1], pa.float16())})
    with pa.ipc.new_stream(f, views.schema) as w:
        w.write_table(views)
