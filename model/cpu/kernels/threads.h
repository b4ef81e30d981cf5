// Threads: one pool that all operations share.
#pragma once

#include <immintrin.h>

#include <atomic>
#include <cstdint>
#include <mutex>
#include <thread>
#include <vector>

namespace {

// Runs the tasks of one job at a time on a few threads. The caller works too and waits only for threads that have
// already started on the job, so a thread whose core is busy with another process delays nothing.
class Pool {
 public:
  void resize(int threads) {
    stop();
    quit_ = false;
    shares_ = std::vector<Share>(threads);
    for (int i = 1; i < threads; ++i) helpers_.emplace_back([this, i] { help(i); });
  }

  int size() const { return static_cast<int>(helpers_.size()) + 1; }

  template <class Body>
  void run(int tasks, const Body& body) {  // body(task, thread)
    if (tasks <= 1 || helpers_.empty()) {
      for (int task = 0; task < tasks; ++task) body(task, 0);
      return;
    }
    call_ = [](const void* data, int task, int thread) { (*static_cast<const Body*>(data))(task, thread); };
    data_ = &body;
    for (int i = 0, n = size(); i < n; ++i) {
      shares_[i].next.store(tasks * i / n, std::memory_order_relaxed);
      shares_[i].end = tasks * (i + 1) / n;
    }
    open_.store(true);
    jobs_.fetch_add(1);
    if (sleeping_.load()) jobs_.notify_all();
    work(0);
    open_.store(false);
    for (int spins = 0; working_.load(); ++spins) pause(spins);
  }

 private:
  static void pause(int spins) {
    if (spins < 20000) _mm_pause(); else std::this_thread::yield();
  }

  // Finish the thread's own share first, since neighbouring tasks are neighbours in memory; then help with the others.
  void work(int thread) {
    for (int i = 0, n = size(); i < n; ++i) {
      Share& share = shares_[(thread + i) % n];
      for (int task; (task = share.next.fetch_add(1)) < share.end;) call_(data_, task, thread);
    }
  }

  void help(int thread) {
    for (uint32_t seen = 0;;) {
      // The next job of a step comes within microseconds: spin that long, then sleep and leave the core to others.
      for (int spins = 0; jobs_.load() == seen && spins < 2000; ++spins) _mm_pause();
      if (jobs_.load() == seen) {
        sleeping_.fetch_add(1);
        jobs_.wait(seen);
        sleeping_.fetch_sub(1);
      }
      if (quit_.load()) return;
      working_.fetch_add(1);
      seen = jobs_.load();
      if (open_.load()) work(thread);
      working_.fetch_sub(1);
    }
  }

  void stop() {
    quit_ = true;
    jobs_.fetch_add(1);
    jobs_.notify_all();
    for (auto& helper : helpers_) helper.join();
    helpers_.clear();
  }

  struct alignas(64) Share {
    std::atomic<int> next{0};
    int end = 0;
  };

  std::vector<std::thread> helpers_;
  std::vector<Share> shares_{1};
  void (*call_)(const void*, int, int) = nullptr;
  const void* data_ = nullptr;
  alignas(64) std::atomic<uint32_t> jobs_{0};
  alignas(64) std::atomic<int> working_{0};
  std::atomic<int> sleeping_{0};
  std::atomic<bool> open_{false}, quit_{false};
};

Pool& pool = *new Pool;  // never destroyed: its threads end with the process
std::mutex in_use;       // one operation at a time, from any thread

template <class Body>
void for_rows(int rows, const Body& body) {  // body(row), four rows to a task
  const int step = rows < 1 ? 1 : rows < 4 ? rows : 4;
  pool.run((rows + step - 1) / step, [&](int task, int) {
    for (int row = task * step; row < rows && row < (task + 1) * step; ++row) body(row);
  });
}

}  // namespace
