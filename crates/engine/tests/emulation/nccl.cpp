// NCCL over emulated cards: the functions that `src/kernels/cuda/nccl.rs` looks up, for ranks that are threads of one
// process. Calls are done later, by a thread of the stream, after a pause that follows from the stream's seed. What NCCL
// demands is checked where NCCL would hang or write anywhere: all ranks ask for the same calls in the same order, memory is
// live, buffers are the same or apart.
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <cstring>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#define EXPORT extern "C" __attribute__((visibility("default")))

typedef int (*Owns)(const void* of, uint64_t address, size_t bytes);
enum { SUCCESS = 0, ARGUMENT = 4, USAGE = 5, IN_PROGRESS = 7 };
enum { FLOAT = 7, SUM = 0 };
struct Id { char bytes[128]; };
struct Config { size_t size; unsigned magic, version; int blocking, cga; };

namespace {

struct Stream {
    uint32_t random;
    Owns owns;
    const void* of;
    std::mutex mutex;
    std::condition_variable changed;
    std::deque<std::function<void()>> jobs;
    bool busy = false, end = false;
    std::thread worker;

    void work() {
        std::unique_lock<std::mutex> lock(mutex);
        for (;;) {
            changed.wait(lock, [&] { return end || !jobs.empty(); });
            if (jobs.empty()) return;
            auto job = std::move(jobs.front());
            jobs.pop_front();
            busy = true;
            random = random * 1664525 + 1013904223;
            uint32_t pause = random >> 21;
            lock.unlock();
            std::this_thread::sleep_for(std::chrono::microseconds(pause));
            job();
            lock.lock();
            busy = false;
            changed.notify_all();
        }
    }
};

struct Call {
    bool sum;
    const float* send;
    float* recv;
    size_t count;
    int root;
};

struct Comm;

// What the ranks asked for at the same point of the order.
struct Round {
    std::vector<const std::vector<Call>*> calls;
    int came = 0, left = 0;
    bool done = false;
};

struct World {
    std::mutex mutex;
    std::condition_variable changed;
    std::vector<Comm*> members;
    int came = 0;
    std::map<uint64_t, Round> rounds;
    std::string error;
};

struct Comm {
    std::shared_ptr<World> world;
    int rank;
    uint64_t next = 0;
    int slow = 0;  // How often the host's part of a call is still in progress.
    bool aborted = false;
    Stream* stream = nullptr;
    std::string said;
};

std::mutex worlds_mutex;
std::map<std::string, std::shared_ptr<World>> worlds;
uint64_t ids = 0;

thread_local int depth = 0;
thread_local std::vector<std::pair<Comm*, Stream*>> group_of;
thread_local std::vector<Call> group;
thread_local std::string said;

std::string text(const Call& c) {
    return std::string(c.sum ? "ncclReduce" : "ncclBroadcast") + " of " + std::to_string(c.count) + " values, root " +
           std::to_string(c.root);
}

// What is wrong with a round that all ranks have come to; nothing where all is well.
std::string wrong(const World& w, const Round& round) {
    const auto& first = *round.calls[0];
    for (size_t rank = 0; rank < round.calls.size(); rank++) {
        const auto& calls = *round.calls[rank];
        std::string who = "rank " + std::to_string(rank);
        if (calls.size() != first.size())
            return who + " has a group of " + std::to_string(calls.size()) + " calls, and rank 0 of " +
                   std::to_string(first.size());
        for (size_t i = 0; i < calls.size(); i++) {
            const Call &c = calls[i], &f = first[i];
            if (c.sum != f.sum || c.count != f.count || c.root != f.root)
                return who + " asks for " + text(c) + ", and rank 0 for " + text(f);
            const Stream& s = *w.members[rank]->stream;
            if (!s.owns(s.of, (uint64_t)c.send, 4 * c.count) || !s.owns(s.of, (uint64_t)c.recv, 4 * c.count))
                return who + ": " + text(c) + ": memory that is not live";
            if (c.send != c.recv && c.send < c.recv + c.count && c.recv < c.send + c.count)
                return who + ": " + text(c) + ": buffers that overlap";
        }
    }
    return "";
}

void execute(const Round& round) {
    int ranks = (int)round.calls.size();
    for (size_t i = 0; i < round.calls[0]->size(); i++) {
        auto at = [&](int rank) -> const Call& { return (*round.calls[rank % ranks])[i]; };
        const Call& root = at(at(0).root);
        if (root.sum) {
            // Around the ring, the root last.
            for (size_t j = 0; j < root.count; j++) {
                float sum = at(root.root + 1).send[j];
                for (int n = 2; n <= ranks; n++) sum += at(root.root + n).send[j];
                root.recv[j] = sum;
            }
        } else {
            for (int n = 0; n < ranks; n++)
                if (at(n).recv != root.send) memmove(at(n).recv, root.send, 4 * root.count);
        }
    }
}

// A rank's part of a round, on its stream's thread.
void take_part(Comm* c, uint64_t number, const std::vector<Call>& calls) {
    World& w = *c->world;
    std::unique_lock<std::mutex> lock(w.mutex);
    int ranks = (int)w.members.size();
    Round& round = w.rounds[number];
    round.calls.resize(ranks, nullptr);
    round.calls[c->rank] = &calls;
    if (++round.came == ranks && w.error.empty()) {
        w.error = wrong(w, round);
        if (w.error.empty()) {
            execute(round);
            round.done = true;
        }
        w.changed.notify_all();
    }
    // As NCCL's kernels, it waits for ever where another does not come or comes with another call.
    w.changed.wait(lock, [&] { return round.done || c->aborted; });
    if (!round.done) round.came = -ranks;
    if (++round.left == ranks) w.rounds.erase(number);
}

int launch() {
    Comm* c = group_of[0].first;
    Stream* s = group_of[0].second;
    for (auto& of : group_of)
        if (of.first != c || of.second != s) {
            said = "one communicator and one stream in a group";
            return USAGE;
        }
    {
        std::lock_guard<std::mutex> lock(c->world->mutex);
        if (c->world->came < (int)c->world->members.size()) {
            said = "the communicator is not ready";
            return USAGE;
        }
        c->stream = s;
    }
    auto calls = std::make_shared<std::vector<Call>>(group);
    uint64_t number = c->next++;
    {
        std::lock_guard<std::mutex> lock(s->mutex);
        s->jobs.push_back([=] { take_part(c, number, *calls); });
    }
    s->changed.notify_all();
    c->slow = (int)(number % 3);
    return c->slow ? IN_PROGRESS : SUCCESS;
}

int add(Call call, int type, int op, void* comm, void* stream) {
    Comm* c = (Comm*)comm;
    if (type != FLOAT || op != SUM || call.count == 0 || !call.send || !call.recv || !stream) {
        said = text(call) + ": an argument that is not expected";
        return ARGUMENT;
    }
    if (call.root < 0 || call.root >= (int)c->world->members.size()) {
        said = text(call) + ": no such rank";
        return ARGUMENT;
    }
    group.push_back(call);
    group_of.push_back({c, (Stream*)stream});
    if (depth > 0) return SUCCESS;
    int code = launch();
    group.clear();
    group_of.clear();
    return code;
}

}  // namespace

EXPORT void* nccl_stream(uint32_t seed, Owns owns, const void* of) {
    Stream* s = new Stream;
    s->random = seed;
    s->owns = owns;
    s->of = of;
    s->worker = std::thread([s] { s->work(); });
    return s;
}

EXPORT void nccl_stream_wait(void* stream) {
    Stream* s = (Stream*)stream;
    std::unique_lock<std::mutex> lock(s->mutex);
    s->changed.wait(lock, [&] { return s->jobs.empty() && !s->busy; });
}

EXPORT void nccl_stream_free(void* stream) {
    Stream* s = (Stream*)stream;
    {
        std::lock_guard<std::mutex> lock(s->mutex);
        s->end = true;
    }
    s->changed.notify_all();
    s->worker.join();
    delete s;
}

EXPORT int ncclGetVersion(int* version) {
    *version = 22005;
    return SUCCESS;
}

EXPORT int ncclGetUniqueId(Id* id) {
    std::lock_guard<std::mutex> lock(worlds_mutex);
    memset(id, 0, sizeof(Id));
    snprintf(id->bytes, sizeof(id->bytes), "emulated %llu", (unsigned long long)++ids);
    return SUCCESS;
}

EXPORT int ncclCommInitRankConfig(void** comm, int ranks, Id id, int rank, Config* config) {
    *comm = nullptr;
    if (config->magic != 0xcafebeef || config->size < 20 || config->version < 21400 || config->blocking != 0) {
        said = "not the configuration of a communicator that does not block";
        return ARGUMENT;
    }
    std::lock_guard<std::mutex> all(worlds_mutex);
    auto& world = worlds[std::string(id.bytes)];
    if (!world) {
        world = std::make_shared<World>();
        world->members.resize(ranks, nullptr);
    }
    std::lock_guard<std::mutex> lock(world->mutex);
    if (ranks != (int)world->members.size() || rank < 0 || rank >= ranks || world->members[rank]) {
        said = "rank " + std::to_string(rank) + " of " + std::to_string(ranks) + " does not belong to this id";
        return USAGE;
    }
    Comm* c = new Comm;
    c->world = world;
    c->rank = rank;
    world->members[rank] = c;
    if (++world->came == ranks) worlds.erase(std::string(id.bytes));
    *comm = c;
    return IN_PROGRESS;
}

EXPORT int ncclCommGetAsyncError(void* comm, int* error) {
    Comm* c = (Comm*)comm;
    std::lock_guard<std::mutex> lock(c->world->mutex);
    if (!c->world->error.empty()) {
        c->said = c->world->error;
        *error = USAGE;
    } else if (c->world->came < (int)c->world->members.size()) {
        *error = IN_PROGRESS;
    } else {
        *error = c->slow > 0 ? IN_PROGRESS : SUCCESS;
        if (c->slow > 0) c->slow--;
    }
    return SUCCESS;
}

// The communicator stays in memory: the stream's thread may be about to leave.
EXPORT int ncclCommAbort(void* comm) {
    Comm* c = (Comm*)comm;
    {
        std::lock_guard<std::mutex> lock(c->world->mutex);
        c->aborted = true;
    }
    c->world->changed.notify_all();
    return SUCCESS;
}

EXPORT int ncclCommFinalize(void* comm) {
    ((Comm*)comm)->slow = 1;
    return IN_PROGRESS;
}

// What is still waited for ends, so that the stream can be freed.
EXPORT int ncclCommDestroy(void* comm) { return ncclCommAbort(comm); }

EXPORT const char* ncclGetErrorString(int code) {
    switch (code) {
        case SUCCESS: return "no error";
        case ARGUMENT: return "invalid argument (run with NCCL_DEBUG=WARN for details)";
        case USAGE: return "invalid usage (run with NCCL_DEBUG=WARN for details)";
        default: return "unknown result code";
    }
}

EXPORT const char* ncclGetLastError(void* comm) {
    return comm && !((Comm*)comm)->said.empty() ? ((Comm*)comm)->said.c_str() : said.c_str();
}

EXPORT int ncclGroupStart() {
    depth++;
    return SUCCESS;
}

EXPORT int ncclGroupEnd() {
    if (depth == 0) {
        said = "no group was begun";
        return USAGE;
    }
    if (--depth > 0 || group.empty()) return SUCCESS;
    int code = launch();
    group.clear();
    group_of.clear();
    return code;
}

EXPORT int ncclReduce(const void* send, void* recv, size_t count, int type, int op, int root, void* comm, void* stream) {
    return add({true, (const float*)send, (float*)recv, count, root}, type, op, comm, stream);
}

EXPORT int ncclBroadcast(const void* send, void* recv, size_t count, int type, int root, void* comm, void* stream) {
    return add({false, (const float*)send, (float*)recv, count, root}, type, SUM, comm, stream);
}
