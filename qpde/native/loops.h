// The loops over pixels and channels. kernels.cpp includes them for each set of instructions, through both_types.h for
// float and double, inside namespaces and under a pragma that lets the compiler use the instructions. REAL is the type
// of the numbers, LANES is how many of them a register holds, and CODES says whether small whole numbers are multiplied
// as integers.
//
// All of them are one small product of matrices, `multiply_add`, whose sums stay in registers.

typedef REAL Real;
typedef Real Reals __attribute__((vector_size(sizeof(Real) * LANES)));

template <class Vector> static inline Vector load(const void* from) {
  Vector v;
  memcpy(&v, from, sizeof v);
  return v;
}

template <class Vector> static inline void store(void* to, Vector v) { memcpy(to, &v, sizeof v); }

constexpr int REGISTERS = LANES * sizeof(Real) / sizeof(float);  // sums that a tile holds: half of the registers

// A product takes GROUP numbers of an image at a time, and GROUP weights of each of the CHANNELS of a register. Where
// channels are too few to fill the lanes, G neighbouring lanes share one: each sums every G-th product.
template <int G> struct OfReals {
  using Number = Real;
  using Weight = Real;
  using Sums = Reals;
  static constexpr int GROUP = G, CHANNELS = LANES / G;

  static inline __attribute__((always_inline)) Sums add(Sums sum, const Number* a, Sums b) {
    if constexpr (G == 1) {
      return sum + *a * b;
    } else if constexpr (G * sizeof(Real) == 8) {
      typedef int64_t Pairs __attribute__((vector_size(sizeof(Reals))));
      return sum + (Reals)(Pairs{} + load<int64_t>(a)) * b;
    } else {
      static_assert(G * sizeof(Real) == 16);
#if BYTES == 64
      return sum + (Reals)_mm512_broadcast_f32x4(load<__m128>(a)) * b;
#else
      return sum + (Reals)_mm256_broadcastsi128_si256(load<__m128i>(a)) * b;
#endif
    }
  }

  // The sums of the channels, in the first lanes.
  static inline __attribute__((always_inline)) Reals totals(Sums sum) {
    if constexpr (G == 1) {
      return sum;
    } else {
      typedef std::conditional_t<sizeof(Real) == 4, int32_t, int64_t> Place;
      typedef Place Places __attribute__((vector_size(sizeof(Reals))));
      Places first;
      for (int lane = 0; lane < LANES; lane++) first[lane] = G * lane % LANES;
      Reals total = __builtin_shuffle(sum, first);
      for (int g = 1; g < G; g++) total += __builtin_shuffle(sum, first + g);
      return total;
    }
  }
};

#if CODES
typedef int32_t Ints __attribute__((vector_size(sizeof(int32_t) * LANES)));

// Whole numbers from 0 to 255 times whole numbers from -128 to 127, exactly. AVX2 has a product of bytes too, but its
// sums of two saturate at 16 bits.
struct OfCodes {
#if LANES == 16
  using Number = uint8_t;
  using Weight = int8_t;
#else
  using Number = int16_t;
  using Weight = int16_t;
#endif
  using Sums = Ints;
  static constexpr int GROUP = 4 / sizeof(Number), CHANNELS = LANES;
  static inline __attribute__((always_inline)) Reals totals(Sums sum) { return __builtin_convertvector(sum, Reals); }
  static inline __attribute__((always_inline)) Sums add(Sums sum, const Number* a, Sums b) {
    int32_t group;
    memcpy(&group, a, sizeof group);
#if LANES == 16
    return (Sums)_mm512_dpbusd_epi32((__m512i)sum, _mm512_set1_epi32(group), (__m512i)b);
#else
    return sum + (Sums)_mm256_madd_epi16(_mm256_set1_epi32(group), (__m256i)b);
#endif
  }
};
#endif

// sum[p][v] += sum over k of a[p a_step + k a_next] * the v-th register from b[k b_next] on, in groups.
template <class Product, int P, int V>
static inline __attribute__((always_inline)) void multiply_add(typename Product::Sums (&sum)[P][V],
                                                               const typename Product::Number* a, int64_t a_step,
                                                               int64_t a_next, const typename Product::Weight* b,
                                                               int64_t b_next, int64_t count) {
#pragma GCC unroll 4
  for (int64_t k = 0; k < count; k++, a += a_next, b += b_next) {
    typename Product::Sums columns[V];
#pragma GCC unroll 2
    for (int v = 0; v < V; v++) columns[v] = load<typename Product::Sums>(b + v * Product::CHANNELS * Product::GROUP);
#pragma GCC unroll 16
    for (int p = 0; p < P; p++)
#pragma GCC unroll 2
      for (int v = 0; v < V; v++) sum[p][v] = Product::add(sum[p][v], a + p * a_step, columns[v]);
  }
}

// P pixels of a row, V registers of channels: the sums over the taps and the channels of the input.
template <class Product, int P, int V>
static void conv_tile(const Phase& phase, int64_t in_channels, const typename Product::Number* in, int64_t in_step,
                      const typename Product::Weight* kernel, Real* out, int64_t out_step, int64_t channels) {
  typename Product::Sums sum[P][V] = {};
  constexpr int CHANNELS = Product::CHANNELS, GROUP = Product::GROUP;
  for (const Run& run : phase.runs) {
    const int64_t count = run.pixels * in_channels;
    multiply_add<Product, P, V>(sum, in + run.first * in_channels, in_step, GROUP, kernel, V * CHANNELS * GROUP,
                                count / GROUP);
    kernel += count * V * CHANNELS;
  }
#pragma GCC unroll 16
  for (int p = 0; p < P; p++)
#pragma GCC unroll 2
    for (int v = 0; v < V; v++) {
      const int64_t left = channels - v * CHANNELS;
      const Reals reals = Product::totals(sum[p][v]);
      if (left >= CHANNELS)
        memcpy(out + p * out_step + v * CHANNELS, &reals, sizeof(Real) * CHANNELS);
      else if (left > 0)
        memcpy(out + p * out_step + v * CHANNELS, &reals, sizeof(Real) * left);
    }
}

// Rows of pixels, P inputs (taps of a row and their channels), V registers of outputs: adds to the kernel's gradient.
template <int P, int V>
static void gradient_tile(int64_t rows, int64_t count, const Real* x, int64_t x_row, int64_t x_next, const Real* y,
                          int64_t y_row, int64_t y_next, Real* kernel, int64_t kernel_step) {
  Reals sum[P][V];
#pragma GCC unroll 16
  for (int p = 0; p < P; p++)
#pragma GCC unroll 2
    for (int v = 0; v < V; v++) sum[p][v] = load<Reals>(kernel + p * kernel_step + v * LANES);
  for (int64_t i = 0; i < rows; i++)
    multiply_add<OfReals<1>, P, V>(sum, x + i * x_row, 1, x_next, y + i * y_row, y_next, count);
#pragma GCC unroll 16
  for (int p = 0; p < P; p++)
#pragma GCC unroll 2
    for (int v = 0; v < V; v++) store(kernel + p * kernel_step + v * LANES, sum[p][v]);
}

// Tiles of 1 to REGISTERS / V pixels or inputs, by their number less one.
template <class Product, int V, int... P> static constexpr auto conv_tiles(std::integer_sequence<int, P...>) {
  return std::array<decltype(&conv_tile<Product, 1, V>), sizeof...(P)>{&conv_tile<Product, P + 1, V>...};
}

template <int V, int... P> static constexpr auto gradient_tiles(std::integer_sequence<int, P...>) {
  return std::array<decltype(&gradient_tile<1, V>), sizeof...(P)>{&gradient_tile<P + 1, V>...};
}

template <int V> using Sizes = std::make_integer_sequence<int, REGISTERS / V>;

// f(first, count) for parts of about one size, at most `most` long.
template <class F> static inline void in_parts(int64_t total, int64_t most, F f) {
  const int64_t parts = (total + most - 1) / most;
  for (int64_t i = 0; i < parts; i++) f(total * i / parts, total * (i + 1) / parts - total * i / parts);
}

// Whether so many channels fit into a register of which G lanes share each, and the inputs come in groups of G.
template <int G> static inline bool fits(const Plan& plan, int64_t channels) {
  return channels <= LANES / G && plan.in_channels % G == 0;
}

// f(product, V, first) for blocks of columns, V registers wide: two, as long as there are so many. The last channels
// share lanes where they are few.
template <class Product, class F> static inline void by_blocks(const Plan& plan, F f) {
  const std::integral_constant<int, 1> one;
  const std::integral_constant<int, 2> two;
  for (int64_t first = 0; first < plan.out_channels;) {
    const int64_t left = plan.out_channels - first;
    const auto block = [&](auto product, auto registers) {
      f(product, registers, first);
      first += registers * product.CHANNELS;
    };
    if constexpr (std::is_same_v<Product, OfReals<1>>) {
      constexpr int MOST = 16 / sizeof(Real), HALF = MOST / 2;  // a group has at most 16 bytes
      if (fits<MOST>(plan, left)) {
        block(OfReals<MOST>(), one);
        continue;
      }
      if (fits<HALF>(plan, left)) {
        block(OfReals<HALF>(), one);
        continue;
      }
      if (left > LANES && fits<4>(plan, left - LANES)) {  // two registers, the second nearly empty, cost more
        block(Product(), one);
        continue;
      }
    }
    if (left > LANES)
      block(Product(), two);
    else
      block(Product(), one);
  }
}

// The kernel in the order in which the tiles read it: for each phase, for each block of columns, tap by tap, one group
// of the input's channels after the other.
template <class Product>
static const typename Product::Weight* packed(const Plan& plan, Place place, const Real* kernel) {
  int64_t taps = 0;
  for (const Phase& phase : plan.phases) taps += phase.taps.size();
  auto* const start =
      scratch<typename Product::Weight>(place, taps * plan.in_channels * rounded_up(plan.out_channels, LANES));
  auto* to = start;
  for (const Phase& phase : plan.phases)
    by_blocks<Product>(plan, [&](auto product, auto registers, int64_t first) {
      const int64_t end = first + registers * product.CHANNELS, last = std::min(end, plan.out_channels);
      for (const Tap& tap : phase.taps) {
        const Real* from = kernel + tap.index * plan.in_channels * plan.out_channels;
        for (int64_t c = 0; c < plan.in_channels; c += product.GROUP) {
          for (int64_t o = first; o < last; o++)
            for (int g = 0; g < product.GROUP; g++) *to++ = from[(c + g) * plan.kernel_in + o * plan.kernel_out];
          to = std::fill_n(to, (end - last) * product.GROUP, 0);
        }
      }
    });
  return start;
}

#if CODES
// Whether images can be convolved as codes with this kernel: its numbers are codes, the sums fit into 32 bits, and the
// products are enough to pay for the conversion of the images.
static bool takes_codes(const Plan& plan, const Real* kernel) {
  const int64_t terms = plan.kernel_taps * plan.in_channels, numbers = terms * plan.out_channels;
  const int64_t products_of_number = plan.kernel_taps * plan.out_channels / (plan.in_stride * plan.in_stride);
  if (plan.in_channels % OfCodes::GROUP != 0 || products_of_number < 64) return false;
  if (terms > INT32_MAX / (255 * 128)) return false;
  if (LANES == 16 && !__builtin_cpu_supports("avx512vnni")) return false;
  return std::all_of(kernel, kernel + numbers, [](Real weight) {
    return weight >= -128.0f && weight <= 127.0f && weight == static_cast<Real>(static_cast<int32_t>(weight));
  });
}

// Numbers as codes. False if one is none: what follows is then unfinished.
static bool encode(const Real* from, int64_t count, OfCodes::Number* to) {
  typedef OfCodes::Number Numbers __attribute__((vector_size(LANES * sizeof(OfCodes::Number))));
  Ints others = {};
  const auto codes_of = [&](Reals numbers) {
    const Ints codes = __builtin_convertvector(numbers, Ints);  // the least one for NaN and what is out of range
    others |= (codes & ~255) | (__builtin_convertvector(codes, Reals) != numbers);
    return __builtin_convertvector(codes, Numbers);
  };
  int64_t i = 0;
  for (; i + LANES <= count; i += LANES) store(to + i, codes_of(load<Reals>(from + i)));
  Reals last = {};
  memcpy(&last, from + i, sizeof(Real) * (count - i));
  const Numbers codes = codes_of(last);
  memcpy(to + i, &codes, sizeof(OfCodes::Number) * (count - i));
  int32_t any = 0;
  for (int lane = 0; lane < LANES; lane++) any |= others[lane];
  return any == 0;
}

// The image as codes between its zeros; nullptr if a number of it is no code.
static const OfCodes::Number* coded(const Plan& plan, const Real* image) {
  const int64_t c = plan.in_channels, width = plan.in_size[1] * c, row = plan.padded[1] * c;
  auto* const start = scratch<OfCodes::Number>(IMAGE, plan.padded[0] * row);
  memset(start, 0, plan.padded[0] * row * sizeof(OfCodes::Number));
  for (int64_t i = 0; i < plan.in_size[0]; i++)
    if (!encode(image + i * width, width, start + (plan.low[0] + i) * row + plan.low[1] * c)) return nullptr;
  return start;
}
#endif

// One phase of an image, V registers of channels.
template <class Product, int V>
static void conv_columns(const Plan& plan, const Phase& phase, const typename Product::Number* in,
                         const typename Product::Weight* kernel, Real* out, int64_t channels) {
  static constexpr auto tiles = conv_tiles<Product, V>(Sizes<V>{});
  const int64_t in_step = plan.in_stride * plan.in_channels, out_step = plan.out_stride * plan.out_channels;
  for (int64_t i = 0; i < phase.count[0]; i++) {
    const auto* row = in + plan.in_stride * i * plan.padded[1] * plan.in_channels;
    Real* to = out + ((plan.out_stride * i + phase.start[0]) * plan.out_size[1] + phase.start[1]) * plan.out_channels;
    in_parts(phase.count[1], REGISTERS / V, [&](int64_t j, int64_t count) {
      tiles[count - 1](phase, plan.in_channels, row + j * in_step, in_step, kernel, to + j * out_step, out_step,
                       channels);
    });
  }
}

template <class Product>
static void conv_image(const Plan& plan, const typename Product::Number* in, const typename Product::Weight* kernel,
                       Real* out) {
  for (const Phase& phase : plan.phases)
    by_blocks<Product>(plan, [&](auto product, auto registers, int64_t first) {
      conv_columns<decltype(product), registers>(plan, phase, in, kernel, out + first, plan.out_channels - first);
      kernel += phase.taps.size() * plan.in_channels * registers * product.CHANNELS;
    });
}

// The convolution or its adjoint, as the plan says. An image of codes is convolved as such where the kernel allows it:
// as long as sums are below 2^24, floats hold them exactly, and the result is the same in every bit.
static void conv(const Plan& plan, const Real* x, const Real* kernel, Real* y, int64_t images, Pool& pool) {
  const auto* weights = packed<OfReals<1>>(plan, KERNEL, kernel);
#if CODES
  const auto* codes = takes_codes(plan, kernel) ? packed<OfCodes>(plan, KERNEL_CODES, kernel) : nullptr;
#endif
  in_parallel(pool, images, [&](int64_t image) {
    const Real* in = x + image * plan.in_numbers();
    Real* out = y + image * plan.out_numbers();
#if CODES
    const auto* in_codes = codes ? coded(plan, in) : nullptr;
    if (in_codes) return conv_image<OfCodes>(plan, in_codes, codes, out);
#endif
    conv_image<OfReals<1>>(plan, plan.is_direct() ? in : padded(plan, in), weights, out);
  });
}

// The kernel's gradient: x and y of the plan of the convolution. Images are summed in groups and the groups in order,
// both chosen by the shapes alone, so that the sums do not depend on the threads.
template <int V>
static void gradient_columns(const Plan& plan, const Real* in, const Real* y, int64_t y_channels, int64_t row,
                             int64_t rows, Real* kernel) {
  static constexpr auto tiles = gradient_tiles<V>(Sizes<V>{});
  const int64_t x_row = plan.in_stride * plan.padded[1] * plan.in_channels, y_row = plan.out_size[1] * y_channels;
  for (const Run& run : plan.phases[0].runs) {
    const Real* x = in + run.first * plan.in_channels + row * x_row;
    in_parts(run.pixels * plan.in_channels, REGISTERS / V, [&](int64_t first, int64_t count) {
      tiles[count - 1](rows, plan.out_size[1], x + first, x_row, plan.in_stride * plan.in_channels, y + row * y_row,
                       y_row, y_channels, kernel + first * y_channels, y_channels);
    });
    kernel += run.pixels * plan.in_channels * y_channels;
  }
}

static void kernel_gradient(const Plan& plan, const Real* x, const Real* y, Real* kernel, int64_t images,
                            Pool& pool) {
  const int64_t inputs = plan.phases[0].taps.size() * plan.in_channels;
  const int64_t channels = rounded_up(plan.out_channels, LANES), pixels = plan.out_size[0] * plan.out_size[1];
  const int64_t groups = std::min(images, std::max<int64_t>(4, std::min<int64_t>(16, (1 << 20) / (inputs * channels))));
  const int64_t most_rows = std::max<int64_t>(1, 128 / plan.out_size[1]);
  Real* sums = scratch<Real>(KERNEL, groups * inputs * channels);
  in_parallel(pool, groups, [&](int64_t group) {
    Real* sum = sums + group * inputs * channels;
    std::fill_n(sum, inputs * channels, Real(0));
    for (int64_t image = images * group / groups; image < images * (group + 1) / groups; image++) {
      const Real *in = x + image * plan.in_numbers(), *out = y + image * plan.out_numbers();
      if (!plan.is_direct()) in = padded(plan, in);
      if (channels != plan.out_channels) out = widened(out, pixels, plan.out_channels, channels);
      in_parts(plan.out_size[0], most_rows, [&](int64_t row, int64_t rows) {
        for (int64_t first = 0; first < channels; first += 2 * LANES)
          (channels - first > LANES ? gradient_columns<2> : gradient_columns<1>)(
              plan, in, out + first, channels, row, rows, sum + first);
      });
    }
  });
  for (int64_t group = 1; group < groups; group++)
    for (int64_t i = 0; i < inputs * channels; i++) sums[i] += sums[group * inputs * channels + i];
  for (size_t tap = 0; tap < plan.phases[0].taps.size(); tap++)
    for (int64_t c = 0; c < plan.in_channels; c++)
      memcpy(kernel + (plan.phases[0].taps[tap].index * plan.in_channels + c) * plan.out_channels,
             sums + (tap * plan.in_channels + c) * channels, sizeof(Real) * plan.out_channels);
}

// The taps that meet pixels of the image, for a row of outputs or one of them, and the outputs from `first` to `end` at
// which all of them do.
struct Meeting {
  int64_t taps = 0, first = 0, end = 0;
  std::array<int64_t, MOST_TAPS> offsets, columns, weights;  // places in the image and in the kernel, in numbers

  void add(int64_t offset, int64_t column, int64_t weight) {
    offsets[taps] = offset, columns[taps] = column, weights[taps++] = weight;
  }
};

static Meeting meeting_of_row(const Plan& plan, const Phase& phase, int64_t i) {
  const int64_t channels = plan.in_channels, row = plan.in_size[1] * channels;
  Meeting met;
  met.end = phase.count[1];
  for (const Tap& tap : phase.taps)
    if (const int64_t place = plan.in_stride * i + tap.row; plan.is_inside(0, place)) {
      met.add((place - plan.low[0]) * row + (tap.column - plan.low[1]) * channels, tap.column, tap.index * channels);
      while (met.first < met.end && !plan.is_inside(1, plan.in_stride * met.first + tap.column)) met.first++;
      while (met.end > met.first && !plan.is_inside(1, plan.in_stride * (met.end - 1) + tap.column)) met.end--;
    }
  return met;
}

// f(j, met) for every output of a row at which some taps meet no pixel, with the others.
template <class F> static inline void at_edges(const Plan& plan, const Meeting& row, int64_t count, F f) {
  for (int64_t j = 0; j < count; j++)
    if (j < row.first || j >= row.end) {
      Meeting met;
      for (int64_t t = 0; t < row.taps; t++)
        if (plan.is_inside(1, plan.in_stride * j + row.columns[t]))
          met.add(row.offsets[t], row.columns[t], row.weights[t]);
      f(j, met);
    }
}

// f(first, T) for groups of T taps: as many as stay in registers.
template <class F> static inline __attribute__((always_inline)) void by_taps(const Meeting& met, F f) {
  int64_t t = 0;
  for (; t + 9 <= met.taps; t += 9) f(t, std::integral_constant<int, 9>());
  for (; t + 3 <= met.taps; t += 3) f(t, std::integral_constant<int, 3>());
  for (; t < met.taps; t++) f(t, std::integral_constant<int, 1>());
}

// f(c, T()) for all channels, T being the type of a register of channels or of one.
template <class F> static inline __attribute__((always_inline)) void by_registers(int64_t channels, F f) {
  int64_t c = 0;
  for (; c + LANES <= channels; c += LANES) f(c, Reals());
  for (; c < channels; c++) f(c, Real(0));
}

// P pixels of a row, V times the channels that `Values` holds.
template <class Values, int P, int V>
static inline __attribute__((always_inline)) void depthwise_tile(const Meeting& met, const Real* in, int64_t in_step,
                                                                 const Real* kernel, Real* out, int64_t out_step) {
  constexpr int64_t NUMBERS = sizeof(Values) / sizeof(Real);
  Values sum[P][V] = {};
  for (int64_t t = 0; t < met.taps; t++) {
    const Real *from = in + met.offsets[t], *weights = kernel + met.weights[t];
#pragma GCC unroll 2
    for (int v = 0; v < V; v++) {
      const Values weight = load<Values>(weights + v * NUMBERS);
#pragma GCC unroll 16
      for (int p = 0; p < P; p++) sum[p][v] += load<Values>(from + p * in_step + v * NUMBERS) * weight;
    }
  }
#pragma GCC unroll 16
  for (int p = 0; p < P; p++)
#pragma GCC unroll 2
    for (int v = 0; v < V; v++) store(out + p * out_step + v * NUMBERS, sum[p][v]);
}

template <int P>
static void depthwise_pixels(const Meeting& met, int64_t channels, const Real* in, int64_t in_step,
                             const Real* kernel, Real* out, int64_t out_step) {
  int64_t c = 0;
  for (; c + 2 * LANES <= channels; c += 2 * LANES)
    depthwise_tile<Reals, P, 2>(met, in + c, in_step, kernel + c, out + c, out_step);
  for (; c + LANES <= channels; c += LANES)
    depthwise_tile<Reals, P, 1>(met, in + c, in_step, kernel + c, out + c, out_step);
  for (; c < channels; c++) depthwise_tile<Real, P, 1>(met, in + c, in_step, kernel + c, out + c, out_step);
}

template <int... P> static constexpr auto depthwise_tiles(std::integer_sequence<int, P...>) {
  return std::array<decltype(&depthwise_pixels<1>), sizeof...(P)>{&depthwise_pixels<P + 1>...};
}

// The depthwise convolution or its adjoint, as the plan says.
static void depthwise(const Plan& plan, const Real* x, const Real* kernel, Real* y, int64_t images, Pool& pool) {
  static constexpr auto tiles = depthwise_tiles(Sizes<2>{});
  const int64_t channels = plan.in_channels, in_step = plan.in_stride * channels;
  const int64_t out_step = plan.out_stride * channels;
  in_parallel(pool, images, [&](int64_t image) {
    const Real* in = x + image * plan.in_numbers();
    for (const Phase& phase : plan.phases)
      for (int64_t i = 0; i < phase.count[0]; i++) {
        const int64_t row = (plan.out_stride * i + phase.start[0]) * plan.out_size[1] + phase.start[1];
        Real* out = y + image * plan.out_numbers() + row * channels;
        const auto pixels = [&](const Meeting& met, int64_t j, int64_t count) {
          tiles[count - 1](met, channels, in + j * in_step, in_step, kernel, out + j * out_step, out_step);
        };
        const Meeting met = meeting_of_row(plan, phase, i);
        at_edges(plan, met, phase.count[1], [&](int64_t j, const Meeting& taps) { pixels(taps, j, 1); });
        in_parts(met.end - met.first, tiles.size(),
                 [&](int64_t j, int64_t count) { pixels(met, met.first + j, count); });
      }
  });
}

// sum[t] += x at tap t times y, over `count` pixels of a row.
template <class Values, int T>
static inline __attribute__((always_inline)) void depthwise_sums(const int64_t* offsets, const Real* x, int64_t x_step,
                                                                 const Real* y, int64_t channels, int64_t count,
                                                                 const int64_t* places, Real* kernel) {
  Values sum[T];
#pragma GCC unroll 9
  for (int t = 0; t < T; t++) sum[t] = load<Values>(kernel + places[t]);
  for (int64_t j = 0; j < count; j++) {
    const Values factor = load<Values>(y + j * channels);
#pragma GCC unroll 9
    for (int t = 0; t < T; t++) sum[t] += load<Values>(x + offsets[t] + j * x_step) * factor;
  }
#pragma GCC unroll 9
  for (int t = 0; t < T; t++) store(kernel + places[t], sum[t]);
}

static void depthwise_gradient(const Plan& plan, const Real* x, const Real* y, Real* kernel, int64_t images,
                               Pool& pool) {
  const Phase& phase = plan.phases[0];
  const int64_t channels = plan.in_channels, x_step = plan.in_stride * channels;
  const int64_t size = phase.taps.size() * channels, groups = std::min<int64_t>(images, 16);
  Real* sums = scratch<Real>(KERNEL, groups * size);
  in_parallel(pool, groups, [&](int64_t group) {
    Real* sum = sums + group * size;
    std::fill_n(sum, size, Real(0));
    for (int64_t image = images * group / groups; image < images * (group + 1) / groups; image++) {
      const Real *in = x + image * plan.in_numbers(), *out = y + image * plan.out_numbers();
      for (int64_t i = 0; i < phase.count[0]; i++) {
        const Meeting met = meeting_of_row(plan, phase, i);
        const auto pixels = [&](const Meeting& taps, int64_t j, int64_t count) {
          const Real* from = in + j * x_step;
          const Real* factors = out + (i * phase.count[1] + j) * channels;
          by_registers(channels, [&](int64_t c, auto values) {
            by_taps(taps, [&](int64_t t, auto group) {
              depthwise_sums<decltype(values), group>(&taps.offsets[t], from + c, x_step, factors + c, channels, count,
                                                      &taps.weights[t], sum + c);
            });
          });
        };
        at_edges(plan, met, phase.count[1], [&](int64_t j, const Meeting& taps) { pixels(taps, j, 1); });
        pixels(met, met.first, met.end - met.first);
      }
    }
  });
  for (int64_t group = 1; group < groups; group++)
    for (int64_t i = 0; i < size; i++) sums[i] += sums[group * size + i];
  memcpy(kernel, sums, sizeof(Real) * size);
}
