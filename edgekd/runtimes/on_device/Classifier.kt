// build.gradle: implementation "com.microsoft.onnxruntime:onnxruntime-android:latest.release"
// Put model.onnx (or model.ort) and labels.txt into src/main/assets.
import ai.onnxruntime.OnnxTensor
import ai.onnxruntime.OrtEnvironment
import android.content.Context
import android.graphics.Bitmap
import java.nio.FloatBuffer

class Classifier(context: Context) : AutoCloseable {
    private val environment = OrtEnvironment.getEnvironment()
    private val session = environment.createSession(context.assets.open("@FILE@").readBytes())
    private val mean = doubleArrayOf(@MEAN@)
    private val std = doubleArrayOf(@STD@)

    /** Scores of the classes; the bitmap is scaled to @WIDTH@ x @HEIGHT@. */
    fun scores(image: Bitmap): FloatArray {
        val scaled = Bitmap.createScaledBitmap(image, @WIDTH@, @HEIGHT@, true)
        val pixels = IntArray(@WIDTH@ * @HEIGHT@)
        scaled.getPixels(pixels, 0, @WIDTH@, 0, 0, @WIDTH@, @HEIGHT@)
        val input = FloatBuffer.allocate(@CHANNELS@ * pixels.size)
        for (channel in 0 until @CHANNELS@) {
            for (pixel in pixels) {
                val value = (pixel shr (16 - 8 * channel)) and 0xFF
                input.put(((value / 255.0 - mean[channel]) / std[channel]).toFloat())
            }
        }
        input.rewind()
        val shape = longArrayOf(1, @CHANNELS@, @HEIGHT@, @WIDTH@)
        OnnxTensor.createTensor(environment, input, shape).use { tensor ->
            session.run(mapOf("@INPUT@" to tensor)).use { result ->
                @Suppress("UNCHECKED_CAST")
                return (result[0].value as Array<FloatArray>)[0]
            }
        }
    }

    override fun close() = session.close()
}
