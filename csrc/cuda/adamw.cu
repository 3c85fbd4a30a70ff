// AdamW over many tensors at once: elementwise, one thread for 16 bytes of each compact array.
//
// The tensors of a launch travel as its argument, some 30 of them in 4 kB: no table has to reach the device, nothing
// has to outlive the call, and a CUDA graph records it as it is. More tensors take more launches. Columns and blocks
// need more said about them: launches of their own leave elements and rows as many, and as fast, as they are alone.
#include <algorithm>
#include <cmath>
#include <type_traits>

#include "../rules/adamw.h"
#include "../rules/round.h"
#include "adamw.h"
#include "device.cuh"
#include "vector.cuh"

namespace sk::cuda {
namespace {

constexpr size_t kArgumentBytes = 4096;  // that every driver takes

template <typename T>
constexpr int kVector = 16 / sizeof(T);  // elements a thread

// Of a step, what may depend on numbers on the device.
template <typename T>
struct alignas(4 * sizeof(T)) Scales {
  T decay, step_size, inv_sqrt_bias2, sign;
};

// The units of a tensor: elements and rows, which begin at a multiple of their width; anything else.
struct Runs {
  int64_t width, limit;
  Runs() = default;
  Runs(const Units& units, int64_t) : width(units.width), limit(units.limit) {}
};
struct Tiles : Units {
  int64_t count;  // positions
  Tiles() = default;
  Tiles(const Units& units, int64_t count) : Units(units), count(count) {}
};

template <typename T, bool tiled>
struct Entry {
  void* values;
  const void* grad;
  void *exp_avg, *exp_avg_sq, *maximum;
  void* weight;
  const void* positions;
  const float* step_counts;  // of the positions, or null
  const Scales<T>* scales;   // on the device, or null: then the step is that of the table, but for
  T step_size, inv_sqrt_bias2;
  const float* device_step;  // the number of the step for random bits, or null: then it is
  uint32_t number, stream;
  std::conditional_t<tiled, Tiles, Runs> units;
  int64_t numel;
  int64_t first_block;
  bool aligned;   // whole vectors of the compact arrays may be read
  bool together;  // a vector lies in one row, and whole vectors of the weight may be read
};

template <typename T>
struct Shared {
  AdamwStep<T> step;  // but for step_size and inv_sqrt_bias2, which differ where tensors have been stepped less often
  T log_beta1, log_beta2;
  const float* found_inf;
  uint64_t seed;
  bool stochastic;
  int count;
};

template <typename T, bool tiled>
constexpr int kTensors = (kArgumentBytes - sizeof(Shared<T>)) / sizeof(Entry<T, tiled>);  // of a launch

template <typename T, bool tiled>
struct Table : Shared<T> {
  Entry<T, tiled> entries[kTensors<T, tiled>];
};

// a / b for a >= 0, b > 0; a 64-bit division takes several times as long.
__device__ __forceinline__ int64_t divide(int64_t a, int64_t b) {
  return ((a | b) >> 32) == 0 ? int64_t(uint32_t(a) / uint32_t(b)) : a / b;
}

// Which position element i of the compact arrays belongs to.
__device__ __forceinline__ int64_t slot_of(const Runs& units, int64_t i) { return divide(i, units.width); }
__device__ __forceinline__ int64_t slot_of(const Tiles& units, int64_t i) {
  return units.side_by_side() ? i - divide(i, units.count) * units.count : divide(i, units.size());
}

// Where element i of the compact arrays lies in the weight.
template <typename I>
__device__ __forceinline__ int64_t place_of(const Runs& units, const I* positions, int64_t i) {
  const int64_t slot = slot_of(units, i);
  return checked(positions[slot], units.limit) * units.width + (i - slot * units.width);
}
// -1 where an edge cuts it off.
template <typename I>
__device__ __forceinline__ int64_t place_of(const Tiles& units, const I* positions, int64_t i) {
  const bool beside = units.side_by_side();
  const int64_t line = divide(i, beside ? units.count : units.width);
  const int64_t slot = beside ? i - line * units.count : divide(line, units.height);
  const int64_t row = beside ? line : line - slot * units.height, column = beside ? 0 : i - line * units.width;
  const auto tile = units.tile(checked(positions[slot], units.limit));
  return row < tile.rows && column < tile.columns ? tile.begin + row * units.n + column : -1;
}

// Where elements [i, i + N) lie; -1 for those that do not exist.
template <int N, typename I, typename T, bool tiled>
__device__ __forceinline__ Vector<int64_t, N> locate(const Entry<T, tiled>& entry, int64_t i, int64_t n) {
  const I* positions = static_cast<const I*>(entry.positions);
  Vector<int64_t, N> at{};
  if (!tiled && entry.units.width == 1) {
    const auto position = read<N>(positions + i, n, entry.aligned && n == N);
#pragma unroll
    for (int j = 0; j < N; ++j) {
      if (j < n) at.at[j] = checked(position.at[j], entry.units.limit);
    }
  } else if (entry.together) {
    const int64_t first = place_of(entry.units, positions, i);
#pragma unroll
    for (int j = 0; j < N; ++j) at.at[j] = tiled && first < 0 ? -1 : first + j;
  } else {
#pragma unroll
    for (int j = 0; j < N; ++j) {
      if (j < n) at.at[j] = place_of(entry.units, positions, i + j);
    }
  }
  return at;
}

template <typename S>
__device__ __forceinline__ S narrowed(float x, uint32_t random) {
  if constexpr (std::is_same_v<S, __nv_bfloat16>) return static_cast<S>(round_to_bf16(x, random));
  if constexpr (std::is_same_v<S, __half>) return static_cast<S>(round_to_fp16(x, random));
  return static_cast<S>(x);
}

// The vector in a narrower type, rounded stochastically where `rounding` says so; draws are what random bits depend on.
template <typename S, int N, typename T>
__device__ __forceinline__ Vector<S, N> narrowed(
    const Vector<T, N>& from, Rounding rounding, const Vector<uint32_t, N>& steps, const Vector<int64_t, N>& at,
    uint32_t array) {
  Vector<S, N> out;
#pragma unroll
  for (int j = 0; j < N; ++j) {
    if (!std::is_same_v<S, T> && std::is_same_v<T, float> && rounding.stochastic) {
      rounding.step = steps.at[j];
      out.at[j] = narrowed<S>(float(from.at[j]), random_bits(rounding, at.at[j], array));
    } else {
      out.at[j] = static_cast<S>(from.at[j]);
    }
  }
  return out;
}

template <typename T, int N, typename S>
__device__ __forceinline__ Vector<T, N> widened(const Vector<S, N>& from) {
  Vector<T, N> out;
#pragma unroll
  for (int j = 0; j < N; ++j) out.at[j] = static_cast<T>(from.at[j]);
  return out;
}

// The rule of rules/adamw.h for N elements a thread; blocks are dealt to the tensors in order. `plain` launches know
// all numbers on the host, have one step for each tensor and round to nearest: they are not to pay in registers for
// what others need. T is the arithmetic's type, W the weight's, S the state's, I the positions'.
template <typename T, typename W, typename S, typename I, bool compact, bool amsgrad, bool plain, bool tiled>
__global__ void __launch_bounds__(kThreads, 1) adamw_kernel(const __grid_constant__ Table<T, tiled> table) {
  constexpr int N = kVector<T>;
  int low = 0, high = table.count;  // the entry of this block is in [low, high)
  while (high - low > 1) {
    const int middle = (low + high) / 2;
    if (table.entries[middle].first_block <= int64_t(blockIdx.x)) low = middle;
    else high = middle;
  }
  const Entry<T, tiled>& entry = table.entries[low];
  const int64_t i = ((int64_t(blockIdx.x) - entry.first_block) * kThreads + threadIdx.x) * N;
  const int64_t n = entry.numel - i;
  if (n <= 0) return;
  const bool whole = entry.aligned && n >= N;

  AdamwStep<T> step = table.step;
  step.step_size = entry.step_size;
  step.inv_sqrt_bias2 = entry.inv_sqrt_bias2;
  if constexpr (!plain) {
    if (table.found_inf && *table.found_inf != 0) return;
    if (entry.scales) {
      const Scales<T> scales = *entry.scales;
      step.decay = scales.decay;
      step.step_size = scales.step_size;
      step.inv_sqrt_bias2 = scales.inv_sqrt_bias2;
      step.sign = scales.sign;
    }
  }
  W* weight = static_cast<W*>(entry.weight);
  S* exp_avg = static_cast<S*>(entry.exp_avg) + i;
  S* exp_avg_sq = static_cast<S*>(entry.exp_avg_sq) + i;
  S* maximum = static_cast<S*>(entry.maximum) + i;

  const auto at = locate<N, I>(entry, i, n);
  if (tiled && entry.together && at.at[0] < 0) return;
  Vector<T, N> x, g, largest{};
  if constexpr (compact) {
    x = read<N>(static_cast<const T*>(entry.values) + i, n, whole);
    g = read<N>(static_cast<const T*>(entry.grad) + i, n, whole);
  } else {
    const auto dense_x = read_at<N, tiled>(static_cast<const W*>(weight), at, n, entry.together);
    const auto dense_g = read_at<N, tiled>(static_cast<const W*>(entry.grad), at, n, entry.together);
#pragma unroll
    for (int j = 0; j < N; ++j) {
      x.at[j] = static_cast<T>(dense_x.at[j]);
      g.at[j] = static_cast<T>(dense_g.at[j]);
    }
  }
  auto m = widened<T>(read<N>(static_cast<const S*>(exp_avg), n, whole));
  auto v = widened<T>(read<N>(static_cast<const S*>(exp_avg_sq), n, whole));
  if constexpr (amsgrad) largest = widened<T>(read<N>(static_cast<const S*>(maximum), n, whole));

#pragma unroll
  for (int j = 0; j < N; ++j) {
    if (tiled && at.at[j] < 0) continue;  // it stays what it is: zero
    if constexpr (plain) {
      x.at[j] = adamw<amsgrad>(x.at[j], g.at[j], m.at[j], v.at[j], &largest.at[j], step);
    } else {
      AdamwStep<T> own = step;
      if (entry.step_counts && j < n) {
        const T step_count = entry.step_counts[slot_of(entry.units, i + j)];
        set_step<T>(own, step, step_count, table.log_beta1, table.log_beta2);
      }
      x.at[j] = adamw<amsgrad>(x.at[j], g.at[j], m.at[j], v.at[j], &largest.at[j], own);
    }
  }
  Rounding rounding{};
  Vector<uint32_t, N> steps{};
  if constexpr (!plain) {
    rounding = {table.seed, 0, entry.stream, table.stochastic};
#pragma unroll
    for (int j = 0; j < N && table.stochastic; ++j) {
      const uint32_t same = entry.device_step ? uint32_t(*entry.device_step) : entry.number;
      steps.at[j] = entry.step_counts && j < n ? uint32_t(entry.step_counts[slot_of(entry.units, i + j)]) : same;
    }
  }
  write<N>(exp_avg, narrowed<S>(m, rounding, steps, at, kExpAvg), n, whole);
  write<N>(exp_avg_sq, narrowed<S>(v, rounding, steps, at, kExpAvgSq), n, whole);
  if constexpr (amsgrad) write<N>(maximum, narrowed<S>(largest, rounding, steps, at, kMaximum), n, whole);
  if constexpr (compact) {
    write<N>(static_cast<T*>(entry.values) + i, x, n, whole);
    rounding.stochastic = false;  // nothing is lost by rounding to nearest: the values stay
  }
  write_at<N, tiled>(weight, at, narrowed<W>(x, rounding, steps, at, kWeight), n, entry.together);
}

constexpr int kSteps = 256;

struct Steps {
  const float* at[kSteps];  // or null: then
  float number[kSteps];
};

// One thread a tensor makes its scales, so that the pow of fp64 is not done again for every element.
template <typename T>
__global__ void scale_kernel(
    const __grid_constant__ Steps steps, int count, Scales<T>* out, AdamwOptions options, const float* lr,
    const float* grad_scale) {
  const int t = int(blockIdx.x * blockDim.x + threadIdx.x);
  if (t >= count) return;
  if (lr) options.lr = *lr;
  if (grad_scale) options.grad_scale = *grad_scale;
  const auto step = adamw_step<T>(steps.at[t] ? *steps.at[t] : steps.number[t], options);
  out[t] = {step.decay, step.step_size, step.inv_sqrt_bias2, step.sign};
}

template <typename T>
const char* launch_scales(const AdamwTensor* tensors, int64_t count, const AdamwCall& call, cudaStream_t stream) {
  for (int64_t first = 0; first < count; first += kSteps) {
    Steps steps{};
    const int n = int(std::min<int64_t>(kSteps, count - first));
    for (int t = 0; t < n; ++t) {
      steps.at[t] = tensors[first + t].device_step;
      steps.number[t] = float(tensors[first + t].step);
    }
    scale_kernel<T><<<1, kSteps, 0, stream>>>(
        steps, n, static_cast<Scales<T>*>(call.scales) + first, call.options, call.lr, call.grad_scale);
    if (const char* error = launch_error()) return error;
  }
  return nullptr;
}

template <typename T, bool tiled>
Entry<T, tiled> make_entry(const AdamwTensor& tensor, int64_t number, const AdamwCall& call, size_t weight_size) {
  constexpr int N = kVector<T>;
  const bool compact = call.compact;
  const Units& units = tensor.units;
  Entry<T, tiled> entry{};
  entry.values = tensor.values;
  entry.grad = tensor.grad;
  entry.exp_avg = tensor.exp_avg;
  entry.exp_avg_sq = tensor.exp_avg_sq;
  entry.maximum = tensor.maximum;
  entry.weight = tensor.weight;
  entry.positions = tensor.positions.data;
  entry.units = {units, tensor.positions.count};
  entry.numel = tensor.numel;
  entry.step_counts = tensor.step_counts;
  entry.device_step = tensor.device_step;
  entry.number = tensor.step_counts || tensor.device_step ? 0 : counter_of(float(tensor.step));
  entry.stream = tensor.stream;
  if (call.scales) {
    entry.scales = static_cast<const Scales<T>*>(call.scales) + number;
  } else {
    const auto step = adamw_step<T>(tensor.step, call.options);
    entry.step_size = step.step_size;
    entry.inv_sqrt_bias2 = step.inv_sqrt_bias2;
  }
  entry.aligned = is_aligned(tensor.exp_avg, 16) && is_aligned(tensor.exp_avg_sq, 16) &&
                  is_aligned(tensor.maximum, 16) && is_aligned(tensor.values, 16) &&
                  (!compact || is_aligned(tensor.grad, 16)) &&
                  (units.size() > 1 || is_aligned(tensor.positions.data, 16));
  entry.together = units.width % N == 0 && units.n % N == 0 && is_aligned(tensor.weight, N * weight_size) &&
                   (compact || is_aligned(tensor.grad, N * weight_size));
  return entry;
}

template <typename T, typename W, typename S, typename I, bool plain, bool tiled>
void launch_table(const Table<T, tiled>& table, int64_t blocks, const AdamwCall& call, cudaStream_t stream) {
  const auto run = [&](auto kernel) { kernel<<<unsigned(blocks), kThreads, 0, stream>>>(table); };
  if (call.compact && call.amsgrad) run(adamw_kernel<T, W, S, I, true, true, plain, tiled>);
  if (call.compact && !call.amsgrad) run(adamw_kernel<T, W, S, I, true, false, plain, tiled>);
  if (!call.compact && call.amsgrad) run(adamw_kernel<T, W, S, I, false, true, plain, tiled>);
  if (!call.compact && !call.amsgrad) run(adamw_kernel<T, W, S, I, false, false, plain, tiled>);
}

template <typename T, typename W, typename I, bool tiled>
const char* launch(const AdamwTensor* tensors, int64_t count, const AdamwCall& call, cudaStream_t stream) {
  static_assert(sizeof(Table<T, tiled>) <= kArgumentBytes);
  static_assert(sizeof(Steps) + sizeof(AdamwOptions) + 64 <= kArgumentBytes);
  static_assert(sizeof(Scales<T>) == kScales * sizeof(T));
  if (call.scales) {
    if (const char* error = launch_scales<T>(tensors, count, call, stream)) return error;
  }
  Table<T, tiled> table{};
  // Any step does: what depends on it stands in the entries.
  table.step = adamw_step<T>(1, call.options);
  table.log_beta1 = T(std::log(call.options.beta1));
  table.log_beta2 = T(std::log(call.options.beta2));
  table.found_inf = call.found_inf;
  table.seed = call.seed;
  table.stochastic = call.stochastic;
  int64_t blocks = 0;
  const bool ordinary = !tiled && !call.found_inf && !call.stochastic && !call.narrow;
  bool plain = ordinary;
  for (int64_t number = 0; number < count; ++number) {
    if (tensors[number].numel > 0) {
      Entry<T, tiled>& entry = table.entries[table.count++];
      entry = make_entry<T, tiled>(tensors[number], number, call, sizeof(W));
      entry.first_block = blocks;
      plain = plain && !entry.step_counts && !entry.scales;
      blocks += divide_up(entry.numel, int64_t(kThreads) * kVector<T>);
    }
    if (table.count == kTensors<T, tiled> || (table.count > 0 && number + 1 == count)) {
      if (plain) {
        if constexpr (!tiled) launch_table<T, W, T, I, true>(table, blocks, call, stream);
      } else if (!call.narrow) {
        launch_table<T, W, T, I, false>(table, blocks, call, stream);
      } else if constexpr (std::is_same_v<T, float>) {
        launch_table<T, W, __nv_bfloat16, I, false>(table, blocks, call, stream);
      }
      if (const char* error = launch_error()) return error;
      table.count = 0;
      blocks = 0;
      plain = ordinary;
    }
  }
  return nullptr;
}

}  // namespace

const char* launch_adamw(const AdamwTensor* tensors, int64_t count, const AdamwCall& call, void* stream) {
  return with_dtype(call.dtype, [&](auto weight, auto number) {
    return with_positions(call.is_int64, [&](auto index) {
      const auto run = call.tiled ? launch<decltype(number), decltype(weight), decltype(index), true>
                                  : launch<decltype(number), decltype(weight), decltype(index), false>;
      return run(tensors, count, call, static_cast<cudaStream_t>(stream));
    });
  });
}

}  // namespace sk::cuda
