// build.gradle: implementation "com.google.ai.edge.litert:litert:latest.release"
// Put model.tflite and labels.txt into src/main/assets.
import android.content.Context
import android.graphics.Bitmap
import java.nio.ByteBuffer
import java.nio.ByteOrder
import kotlin.math.roundToInt
import org.tensorflow.lite.DataType
import org.tensorflow.lite.Interpreter

class LiteRtClassifier(context: Context) : AutoCloseable {
    private val interpreter = Interpreter(
        context.assets.open("@FILE@").readBytes().let { bytes ->
            ByteBuffer.allocateDirect(bytes.size).order(ByteOrder.nativeOrder()).put(bytes)
        }
    )
    private val mean = doubleArrayOf(@MEAN@)
    private val std = doubleArrayOf(@STD@)

    /** Scores of the classes; the bitmap is scaled to @WIDTH@ x @HEIGHT@. */
    fun scores(image: Bitmap): FloatArray {
        val scaled = Bitmap.createScaledBitmap(image, @WIDTH@, @HEIGHT@, true)
        val pixels = IntArray(@WIDTH@ * @HEIGHT@)
        scaled.getPixels(pixels, 0, @WIDTH@, 0, 0, @WIDTH@, @HEIGHT@)
        val input = interpreter.getInputTensor(0)
        val given = ByteBuffer.allocateDirect(input.numBytes()).order(ByteOrder.nativeOrder())
        val steps = input.quantizationParams()
        for (pixel in pixels) {
            for (channel in 0 until @CHANNELS@) {
                val value = (pixel shr (16 - 8 * channel)) and 0xFF
                val x = (value / 255.0 - mean[channel]) / std[channel]
                if (input.dataType() == DataType.FLOAT32) {
                    given.putFloat(x.toFloat())
                } else {
                    val step = (x / steps.scale).roundToInt() + steps.zeroPoint
                    given.put(step.coerceIn(-128, 127).toByte())
                }
            }
        }
        val output = interpreter.getOutputTensor(0)
        val found = ByteBuffer.allocateDirect(output.numBytes()).order(ByteOrder.nativeOrder())
        interpreter.run(given.rewind(), found)
        found.rewind()
        val real = output.quantizationParams()
        return FloatArray(output.numElements()) {
            if (output.dataType() == DataType.FLOAT32) found.getFloat()
            else (found.get() - real.zeroPoint) * real.scale
        }
    }

    override fun close() = interpreter.close()
}
