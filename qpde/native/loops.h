// The loops over pixels and channels. kernels.cpp includes this file once for each set of instructions, inside a
// namespace and under a pragma that lets the compiler use them; LANES is how many floats a register holds.
//
// All of them are one small product of matrices, `multiply_add`, whose sums stay in registers. It counts in words of 32
// bits: a word is a float, or a few codes that one instruction multiplies with as many others (`Codes`).

typedef float Floats __attribute__((vector_size(4 * LANES)));
typedef int32_t Wholes __attribute__((vector_size(4 * LANES)));

template <class Vector> static inline Vector load(const void* from) {
  Vector v;
  memcpy(&v, from, sizeof v);
  return v;
}

template <class Vector> static inline void store(void* to, Vector v) { memcpy(to, &v, sizeof v); }

struct Reals {
  using Word = float;
  using Sum = Floats;
  static constexpr int64_t group = 1;  // channels in a word
  static inline Sum multiply_add(Sum sum, Word a, Sum b) { return sum + a * b; }
  static inline Floats real(Sum sum, float) { return sum; }
};

constexpr int REGISTERS = LANES;  // sums that a tile holds: half of the registers

// sum[p][v] += sum over k of a[p a_step + k a_next] * b[k b_next + v LANES ...]
template <class A, int P, int V>
static inline __attribute__((always_inline)) void multiply_add(typename A::Sum (&sum)[P][V],
                                                               const typename A::Word* a, int64_t a_step,
                                                               int64_t a_next, const typename A::Word* b,
                                                               int64_t b_next, int64_t count) {
  for (int64_t k = 0; k < count; k++, a += a_next, b += b_next) {
    typename A::Sum columns[V];
#pragma GCC unroll 2
    for (int v = 0; v < V; v++) columns[v] = load<typename A::Sum>(b + v * LANES);
#pragma GCC unroll 16
    for (int p = 0; p < P; p++)
#pragma GCC unroll 2
      for (int v = 0; v < V; v++) sum[p][v] = A::multiply_add(sum[p][v], a[p * a_step], columns[v]);
  }
}

// P pixels of a row, V registers of channels: the sums over the taps and the channels of the input.
template <class A, int P, int V>
static void conv_tile(const Phase& phase, const typename A::Word* in, int64_t in_step, const typename A::Word* kernel,
                      float* out, int64_t out_step, int64_t channels, float scale) {
  typename A::Sum sum[P][V] = {};
  for (const Run& run : phase.runs) {
    multiply_add<A, P, V>(sum, in + run.offset, in_step, 1, kernel, V * LANES, run.count);
    kernel += run.count * V * LANES;
  }
#pragma GCC unroll 16
  for (int p = 0; p < P; p++)
#pragma GCC unroll 2
    for (int v = 0; v < V; v++) {
      const Floats result = A::real(sum[p][v], scale);
      const int64_t left = channels - v * LANES;
      if (left >= LANES)
        store(out + p * out_step + v * LANES, result);
      else if (left > 0)
        memcpy(out + p * out_step + v * LANES, &result, 4 * left);
    }
}

// Rows of pixels, P inputs (taps of a row and their channels), V registers of outputs: adds to the kernel's gradient.
template <int P, int V>
static void gradient_tile(int64_t rows, int64_t count, const float* x, int64_t x_row, int64_t x_next, const float* y,
                          int64_t y_row, int64_t y_next, float* kernel, int64_t kernel_step) {
  Floats sum[P][V];
#pragma GCC unroll 16
  for (int p = 0; p < P; p++)
#pragma GCC unroll 2
    for (int v = 0; v < V; v++) sum[p][v] = load<Floats>(kernel + p * kernel_step + v * LANES);
  for (int64_t i = 0; i < rows; i++)
    multiply_add<Reals, P, V>(sum, x + i * x_row, 1, x_next, y + i * y_row, y_next, count);
#pragma GCC unroll 16
  for (int p = 0; p < P; p++)
#pragma GCC unroll 2
    for (int v = 0; v < V; v++) store(kernel + p * kernel_step + v * LANES, sum[p][v]);
}

// Tiles of 1 to REGISTERS / V pixels or inputs, by their number less one.
template <class A, int V, int... P> static auto conv_tiles(std::integer_sequence<int, P...>) {
  return std::array<decltype(&conv_tile<A, 1, V>), sizeof...(P)>{&conv_tile<A, P + 1, V>...};
}

template <int V, int... P> static auto gradient_tiles(std::integer_sequence<int, P...>) {
  return std::array<decltype(&gradient_tile<1, V>), sizeof...(P)>{&gradient_tile<P + 1, V>...};
}

template <int V> using Sizes = std::make_integer_sequence<int, REGISTERS / V>;

// f(first, count) for parts of about one size, at most `most` long.
template <class F> static inline void in_parts(int64_t total, int64_t most, F f) {
  const int64_t parts = (total + most - 1) / most;
  for (int64_t i = 0; i < parts; i++) f(total * i / parts, total * (i + 1) / parts - total * i / parts);
}

// The kernel in the order in which the tiles read it: for each phase, for each block of columns, run by run.
template <class A> static int64_t packed_words(const Plan& plan) {
  int64_t taps = 0;
  for (const Phase& phase : plan.phases) taps += phase.taps.size();
  return taps * plan.words(A::group) * rounded_up(plan.out_channels, LANES);
}

template <class A, class Value>
static void pack(const Plan& plan, const float* kernel, typename A::Word* packed, Value value) {
  using Number = decltype(value(0.0f));
  Number* to = reinterpret_cast<Number*>(packed);
  const int64_t channels = plan.words(A::group) * A::group;
  for (const Phase& phase : plan.phases)
    for (int64_t first = 0; first < plan.out_channels; first += 2 * LANES) {
      const int64_t width = std::min<int64_t>(2 * LANES, rounded_up(plan.out_channels - first, LANES));
      for (const Tap& tap : phase.taps) {
        const float* from = kernel + tap.index * plan.in_channels * plan.out_channels;
        for (int64_t c = 0; c < channels; c += A::group)
          for (int64_t o = first; o < first + width; o++)
            for (int64_t i = c; i < c + A::group; i++)
              *to++ = i < plan.in_channels && o < plan.out_channels
                          ? value(from[i * plan.kernel_in + o * plan.kernel_out]) : Number(0);
      }
    }
}

// One image, whose words are padded as the plan says.
template <class A, int V>
static void conv_columns(const Plan& plan, const Phase& phase, const typename A::Word* in,
                         const typename A::Word* kernel, float* out, int64_t channels, float scale) {
  static const auto tiles = conv_tiles<A, V>(Sizes<V>{});
  const int64_t words = plan.words(A::group);
  const int64_t in_step = plan.in_stride * words, out_step = plan.out_stride * plan.out_channels;
  for (int64_t i = 0; i < phase.count[0]; i++) {
    const typename A::Word* row = in + plan.in_stride * i * plan.padded[1] * words;
    float* to = out + ((plan.out_stride * i + phase.start[0]) * plan.out_size[1] + phase.start[1]) * plan.out_channels;
    in_parts(phase.count[1], REGISTERS / V, [&](int64_t j, int64_t count) {
      tiles[count - 1](phase, row + j * in_step, in_step, kernel, to + j * out_step, out_step, channels, scale);
    });
  }
}

template <class A>
static void conv_image(const Plan& plan, const typename A::Word* in, const typename A::Word* kernel, float* out,
                       float scale) {
  for (const Phase& phase : plan.phases) {
    const int64_t words = phase.taps.size() * plan.words(A::group);
    for (int64_t first = 0; first < plan.out_channels; first += 2 * LANES) {
      const int64_t channels = plan.out_channels - first;
      if (channels > LANES) {
        conv_columns<A, 2>(plan, phase, in, kernel, out + first, channels, scale);
        kernel += words * 2 * LANES;
      } else {
        conv_columns<A, 1>(plan, phase, in, kernel, out + first, channels, scale);
        kernel += words * LANES;
      }
    }
  }
}

static void conv(const Plan& plan, const float* x, const float* kernel, float* y, int64_t images, Pool& pool) {
  float* packed = scratch<float>(0, packed_words<Reals>(plan));
  pack<Reals>(plan, kernel, packed, [](float value) { return value; });
  in_parallel(pool, images, [&](int64_t image) {
    const float* in = x + image * plan.in_numbers();
    if (!plan.is_direct()) in = padded(plan, in, scratch<float>(1, plan.padded_numbers()));
    conv_image<Reals>(plan, in, packed, y + image * plan.out_numbers(), 1.0f);
  });
}

// The kernel's gradient: x and y of the plan of the convolution. Images are summed in groups and the groups in order,
// both chosen by the shapes alone, so that the sums do not depend on the threads.
template <int V>
static void gradient_columns(const Plan& plan, const float* in, const float* y, int64_t y_channels, int64_t row,
                             int64_t rows, float* kernel) {
  static const auto tiles = gradient_tiles<V>(Sizes<V>{});
  const int64_t x_row = plan.in_stride * plan.padded[1] * plan.in_channels, y_row = plan.out_size[1] * y_channels;
  for (const Run& run : plan.phases[0].runs) {
    const float* x = in + run.offset + row * x_row;
    in_parts(run.count, REGISTERS / V, [&](int64_t first, int64_t count) {
      tiles[count - 1](rows, plan.out_size[1], x + first, x_row, plan.in_stride * plan.in_channels, y + row * y_row,
                       y_row, y_channels, kernel + first * y_channels, y_channels);
    });
    kernel += run.count * y_channels;
  }
}

static void kernel_gradient(const Plan& plan, const float* x, const float* y, float* kernel, int64_t images,
                            Pool& pool) {
  const int64_t inputs = plan.phases[0].taps.size() * plan.in_channels;
  const int64_t channels = rounded_up(plan.out_channels, LANES), pixels = plan.out_size[0] * plan.out_size[1];
  const int64_t groups = std::min(images, std::max<int64_t>(4, std::min<int64_t>(16, (1 << 20) / (inputs * channels))));
  const int64_t most_rows = std::max<int64_t>(1, 128 / plan.out_size[1]);
  float* sums = scratch<float>(0, groups * inputs * channels);
  in_parallel(pool, groups, [&](int64_t group) {
    float* sum = sums + group * inputs * channels;
    std::fill_n(sum, inputs * channels, 0.0f);
    for (int64_t image = images * group / groups; image < images * (group + 1) / groups; image++) {
      const float *in = x + image * plan.in_numbers(), *out = y + image * plan.out_numbers();
      if (!plan.is_direct()) in = padded(plan, in, scratch<float>(1, plan.padded_numbers()));
      if (channels != plan.out_channels) out = widened(out, pixels, plan.out_channels, channels);
      in_parts(plan.out_size[0], most_rows, [&](int64_t row, int64_t rows) {
        for (int64_t first = 0; first < channels; first += 2 * LANES)
          if (channels - first > LANES)
            gradient_columns<2>(plan, in, out + first, channels, row, rows, sum + first);
          else
            gradient_columns<1>(plan, in, out + first, channels, row, rows, sum + first);
      });
    }
  });
  for (int64_t group = 1; group < groups; group++)
    for (int64_t i = 0; i < inputs * channels; i++) sums[i] += sums[group * inputs * channels + i];
  for (size_t tap = 0; tap < plan.phases[0].taps.size(); tap++)
    for (int64_t c = 0; c < plan.in_channels; c++)
      memcpy(kernel + (plan.phases[0].taps[tap].index * plan.in_channels + c) * plan.out_channels,
             sums + (tap * plan.in_channels + c) * channels, 4 * plan.out_channels);
}
