// Convolutions for CPUs, called by XLA through its foreign function interface. Their only header beside those of the
// language is XLA's own, in `jax.ffi.include_dir()`.
//
// Images are (N, H, W, C) and kernels (kh, kw, C_in, C_out), all of float32 or of float64. `conv` and its adjoint are
// one loop: every pixel of the output is a sum, over taps, of pixels of the input times a matrix. In a convolution of
// stride s the taps are the same for all outputs, which take every s-th pixel. In its adjoint the outputs fall into
// s x s phases that meet different taps, so no zero is multiplied. A `Plan` lists the phases and their taps.
//
// Sums are added in an order that the shapes alone decide, whatever threads there are: results repeat bit for bit.
// Where an image and a kernel in float32 are of codes, small whole numbers, `conv` multiplies integers.

#include <algorithm>
#include <array>
#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <mutex>
#include <type_traits>
#include <utility>
#include <vector>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;
using Pool = ffi::ThreadPool;

namespace {

int64_t rounded_up(int64_t value, int64_t unit) { return (value + unit - 1) / unit * unit; }

enum Place { KERNEL, KERNEL_CODES, IMAGE, WIDENED, PLACES };

// What one thread keeps from call to call: fresh pages of memory would cost as much as the sums.
template <class T> T* scratch(Place place, int64_t count) {
  struct Memory {
    void* data = nullptr;
    size_t size = 0;
    ~Memory() { std::free(data); }
  };
  thread_local Memory memories[PLACES];
  Memory& memory = memories[place];
  const size_t needed = rounded_up(count * sizeof(T), 64);
  if (memory.size < needed) {
    std::free(memory.data);
    memory.data = std::aligned_alloc(64, needed);
    memory.size = needed;
  }
  return static_cast<T*>(memory.data);
}

// work(0), ..., work(tasks - 1), shared with the threads of the pool. The caller works too and waits only for what
// others have begun: it may itself be a thread of a pool whose threads all wait. Helpers that come late find nothing
// left, and touch nothing but the state, which they keep alive.
void in_parallel(Pool& pool, int64_t tasks, const std::function<void(int64_t)>& work) {
  struct State {
    std::atomic<int64_t> next{0};
    int64_t done = 0;
    std::mutex mutex;
    std::condition_variable finished;
  };
  auto state = std::make_shared<State>();
  auto help = [state, tasks, &work] {
    int64_t done = 0;
    for (int64_t task; (task = state->next++) < tasks; done++) work(task);
    if (done == 0) return;
    std::lock_guard<std::mutex> lock(state->mutex);
    if ((state->done += done) == tasks) state->finished.notify_one();
  };
  const int64_t helpers = std::min(pool.num_threads(), tasks) - 1;
  for (int64_t i = 0; i < helpers; i++) pool.Schedule(std::function<void()>(help));
  help();
  std::unique_lock<std::mutex> lock(state->mutex);
  state->finished.wait(lock, [&] { return state->done == tasks; });
}

constexpr int64_t MOST_TAPS = 49;  // of a depthwise kernel

struct Tap {
  int64_t row, column;  // of the padded input, for the first output
  int64_t index;        // in the kernel
};

// Neighbouring taps of a row, whose inputs lie side by side.
struct Run {
  int64_t first, pixels;
};

// Outputs that meet the same taps.
struct Phase {
  std::array<int64_t, 2> start, count;
  std::vector<Tap> taps;
  std::vector<Run> runs;
};

struct Plan {
  std::array<int64_t, 2> in_size, out_size, low, padded;
  int64_t in_channels, out_channels, in_stride, out_stride, kernel_taps;
  int64_t kernel_in, kernel_out;  // steps of the two in the kernel
  std::vector<Phase> phases;

  int64_t in_numbers() const { return in_size[0] * in_size[1] * in_channels; }
  int64_t out_numbers() const { return out_size[0] * out_size[1] * out_channels; }
  bool is_inside(int axis, int64_t place) const {  // whether a place of the padded input is one of the image
    return place >= low[axis] && place < low[axis] + in_size[axis];
  }
  bool is_direct() const { return padded == in_size; }  // no zeros are needed
};

using Sizes2 = std::array<int64_t, 2>;
using Dimensions = ffi::AnyBuffer::Dimensions;

struct Geometry {
  Sizes2 size, size_out, taps, padding;  // of x, of y, of the kernel
  int64_t stride, dilation, c_in, c_out;
};

// Places of the taps along one axis, for the outputs of one phase; those that an output of another phase meets are -1.
struct Axis {
  std::vector<std::vector<int64_t>> places;  // by phase, by tap
  int64_t low, padded;
};

Axis axis_of(const Geometry& g, int d, bool is_adjoint) {
  const int64_t in = is_adjoint ? g.size_out[d] : g.size[d], out = is_adjoint ? g.size[d] : g.size_out[d];
  const int64_t phases = is_adjoint ? g.stride : 1;
  std::vector<std::vector<int64_t>> offsets(phases, std::vector<int64_t>(g.taps[d], INT64_MIN));
  int64_t first = 0, last = in - 1;
  for (int64_t phase = 0; phase < phases; phase++)
    for (int64_t tap = 0; tap < g.taps[d]; tap++) {
      int64_t offset = g.dilation * tap - g.padding[d], in_stride = g.stride;
      if (is_adjoint) {
        if ((phase - offset) % g.stride != 0) continue;
        offset = (phase - offset) / g.stride;
        in_stride = 1;
      }
      const int64_t count = (out - phase + phases - 1) / phases;
      if (count <= 0) continue;
      offsets[phase][tap] = offset;
      first = std::min(first, offset);
      last = std::max(last, offset + in_stride * (count - 1));
    }
  for (auto& row : offsets)
    for (int64_t& offset : row) offset = offset == INT64_MIN ? -1 : offset - first;
  return {offsets, -first, last - first + 1};
}

Plan plan_of(const Geometry& g, bool is_adjoint) {
  const Axis axes[2] = {axis_of(g, 0, is_adjoint), axis_of(g, 1, is_adjoint)};
  const int64_t zero = 0;
  Plan plan;
  plan.low = {axes[0].low, axes[1].low};
  plan.padded = {axes[0].padded, axes[1].padded};
  plan.in_size = is_adjoint ? g.size_out : g.size;
  plan.out_size = is_adjoint ? g.size : g.size_out;
  plan.in_channels = is_adjoint ? g.c_out : g.c_in;
  plan.out_channels = is_adjoint ? g.c_in : g.c_out;
  plan.in_stride = is_adjoint ? 1 : g.stride;
  plan.out_stride = is_adjoint ? g.stride : 1;
  plan.kernel_taps = g.taps[0] * g.taps[1];
  plan.kernel_in = is_adjoint ? 1 : g.c_out;
  plan.kernel_out = is_adjoint ? g.c_out : 1;
  for (size_t i = 0; i < axes[0].places.size(); i++)
    for (size_t j = 0; j < axes[1].places.size(); j++) {
      Phase phase;
      phase.start = {int64_t(i), int64_t(j)};
      for (int d = 0; d < 2; d++)
        phase.count[d] =
            std::max(zero, rounded_up(plan.out_size[d] - phase.start[d], plan.out_stride) / plan.out_stride);
      for (int64_t a = 0; a < g.taps[0]; a++)
        for (int64_t b = 0; b < g.taps[1]; b++)
          if (axes[0].places[i][a] >= 0 && axes[1].places[j][b] >= 0)
            phase.taps.push_back({axes[0].places[i][a], axes[1].places[j][b], a * g.taps[1] + b});
      std::sort(phase.taps.begin(), phase.taps.end(), [](const Tap& a, const Tap& b) {
        return std::make_pair(a.row, a.column) < std::make_pair(b.row, b.column);
      });
      plan.phases.push_back(phase);
    }
  // A kernel of one tap at stride 1 knows no rows: an image is one.
  if (plan.padded == plan.in_size && plan.in_size == plan.out_size && g.taps == Sizes2{1, 1} && g.stride == 1) {
    plan.in_size = plan.out_size = plan.padded = plan.phases[0].count = {1, plan.in_size[0] * plan.in_size[1]};
  }
  for (Phase& phase : plan.phases)
    for (size_t t = 0; t < phase.taps.size(); t++) {
      const Tap &tap = phase.taps[t], &last = phase.taps[t ? t - 1 : 0];
      if (t && last.row == tap.row && last.column + 1 == tap.column)
        phase.runs.back().pixels++;
      else
        phase.runs.push_back({tap.row * plan.padded[1] + tap.column, 1});
    }
  return plan;
}

// The image between its zeros.
template <class Real> const Real* padded(const Plan& plan, const Real* image) {
  const int64_t c = plan.in_channels, width = plan.in_size[1] * c, row = plan.padded[1] * c;
  Real* const start = scratch<Real>(IMAGE, plan.padded[0] * row);
  for (int64_t i = 0; i < plan.padded[0]; i++) {
    Real *to = start + i * row, *inside = to + plan.low[1] * c;
    if (!plan.is_inside(0, i)) {
      std::fill_n(to, row, Real(0));
      continue;
    }
    std::fill(to, inside, Real(0));
    memcpy(inside, image + (i - plan.low[0]) * width, sizeof(Real) * width);
    std::fill(inside + width, to + row, Real(0));
  }
  return start;
}

// Pixels with zeros behind their channels.
template <class Real> const Real* widened(const Real* from, int64_t pixels, int64_t channels, int64_t width) {
  Real* to = scratch<Real>(WIDENED, pixels * width);
  for (int64_t i = 0; i < pixels; i++) {
    memcpy(to + i * width, from + i * channels, sizeof(Real) * channels);
    std::fill(to + i * width + channels, to + (i + 1) * width, Real(0));
  }
  return to;
}

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)  // Clang spells the pragmas otherwise
#define NATIVE 1
#pragma GCC push_options
#pragma GCC target("avx512f,avx512vnni,fma")
namespace avx512 {
#define BYTES 64
#include "both_types.h"
#undef BYTES
}  // namespace avx512
#pragma GCC pop_options

#pragma GCC push_options
#pragma GCC target("avx2,fma")
namespace avx2 {
#define BYTES 32
#include "both_types.h"
#undef BYTES
}  // namespace avx2
#pragma GCC pop_options
#endif

int found() {
#if defined(NATIVE)
  __builtin_cpu_init();
  if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma")) return 0;
  return __builtin_cpu_supports("avx512f") ? 512 : 256;
#else
  return 0;
#endif
}

int instructions = found();  // bits of the registers in use, 0 for no kernels

template <class Real> using Array = ffi::Buffer<std::is_same_v<Real, float> ? ffi::F32 : ffi::F64>;
template <class Real> using Loop = void (*)(const Plan&, const Real*, const Real*, Real*, int64_t, Pool&);
using Numbers = ffi::Span<const int64_t>;

Geometry geometry(const Dimensions& x, const Dimensions& y, const Dimensions& kernel, Numbers padding, int64_t stride,
                  int64_t dilation) {
  return {{x[1], x[2]}, {y[1], y[2]},  {kernel[0], kernel[1]}, {padding[0], padding[1]},
          stride,       dilation,      x[3],                   y[3]};
}

// The three maps of one trilinear form T(x, kernel, y): each takes two of them and returns the third.
enum Map { CONV, ADJOINT, GRADIENT };

template <Map map, class Real>
ffi::Error run(Loop<Real> avx512_loop, Loop<Real> avx2_loop, Pool& pool, Array<Real>& a, Array<Real>& b,
               ffi::Result<Array<Real>>& c, Numbers padding, int64_t stride, int64_t dilation) {
  const auto x = (map == ADJOINT ? *c : a).dimensions(), y = (map == CONV ? *c : map == ADJOINT ? a : b).dimensions();
  const auto kernel = (map == GRADIENT ? *c : b).dimensions();
  const Plan plan = plan_of(geometry(x, y, kernel, padding, stride, dilation), map == ADJOINT);
  (instructions == 512 ? avx512_loop : avx2_loop)(plan, a.typed_data(), b.typed_data(), c->typed_data(), x[0], pool);
  return ffi::Error::Success();
}

}  // namespace

// Bits of the registers that the kernels use, limited to those given; 0 where this processor has none of them.
extern "C" int qpde_instructions(int most) {
  const int here = found();
  return instructions = most >= here ? here : most >= 256 && here ? 256 : 0;
}

#if defined(NATIVE)
#define HANDLER(name, map, loop, Real)                                                                              \
  static ffi::Error name##_call(Pool pool, Array<Real> a, Array<Real> b, ffi::Result<Array<Real>> c, Numbers padding, \
                                int64_t stride, int64_t dilation) {                                                 \
    return run<map, Real>(avx512::of_##Real::loop, avx2::of_##Real::loop, pool, a, b, c, padding, stride, dilation); \
  }                                                                                                                 \
  XLA_FFI_DEFINE_HANDLER_SYMBOL(name, name##_call,                                                                  \
                                ffi::Ffi::Bind()                                                                    \
                                    .Ctx<Pool>()                                                                    \
                                    .Arg<Array<Real>>()                                                             \
                                    .Arg<Array<Real>>()                                                             \
                                    .Ret<Array<Real>>()                                                             \
                                    .Attr<Numbers>("padding")                                                       \
                                    .Attr<int64_t>("stride")                                                        \
                                    .Attr<int64_t>("dilation"))

#define HANDLERS(name, map, loop) \
  HANDLER(qpde_##name##_float32, map, loop, float); \
  HANDLER(qpde_##name##_float64, map, loop, double)

HANDLERS(conv, CONV, conv);
HANDLERS(conv_adjoint, ADJOINT, conv);
HANDLERS(kernel_gradient, GRADIENT, kernel_gradient);
HANDLERS(depthwise, CONV, depthwise);
HANDLERS(depthwise_adjoint, ADJOINT, depthwise);
HANDLERS(depthwise_kernel_gradient, GRADIENT, depthwise_gradient);

// The array itself: what XLA computes for a call is not computed again for each of its other uses.
static ffi::Error materialize_call(ffi::AnyBuffer x, ffi::Result<ffi::AnyBuffer> same) {
  if (same->untyped_data() != x.untyped_data()) std::memcpy(same->untyped_data(), x.untyped_data(), x.size_bytes());
  return ffi::Error::Success();
}
XLA_FFI_DEFINE_HANDLER_SYMBOL(qpde_materialize, materialize_call,
                              ffi::Ffi::Bind().Arg<ffi::AnyBuffer>().Ret<ffi::AnyBuffer>());
#endif
